"""Commands and links of the documentation are to what there is."""

import collections
import re
import shlex

import pytest

from tests import runs
from vitgan_jax import config as config_lib
from vitgan_jax import evaluate, processes, replay, sample, train

PAGES = (
  "README.md",
  *sorted(str(p.relative_to(runs.ROOT)) for p in runs.ROOT.glob("docs/*.md")),
  *sorted(
    str(p.relative_to(runs.ROOT)) for p in runs.ROOT.glob("configs/**/*.py")
  ),
)
# What follows a command's name on its line, and on lines that it goes on in.
_COMMAND = re.compile(
  r"^\s*python -m (vitgan_jax\.main|launch\.local)\b((?:.*\\\n)*.*)",
  re.MULTILINE,
)
_LINK = re.compile(r"\]\(\s*(?!https?:)([^)#\s]*)#?([^)\s]*)\)")
_CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def commands():
  """Returns [(page, module, words)]; those with an ellipsis are none."""
  found = []
  for page in PAGES:
    text = (runs.ROOT / page).read_text()
    for module, rest in _COMMAND.findall(text):
      if "..." not in rest:
        words = shlex.split(rest.replace("\\\n", " "), comments=True)
        found.append((page, module, words))
  return found


def test_there_are_commands():
  pages = {page for page, *_ in commands()}
  assert {"README.md", "docs/lab_book.md", "configs/cifar16.py"} <= pages


@pytest.mark.parametrize(
  "module, words",
  [
    pytest.param(module, words, id=f"{page}-{' '.join(words)[:60]}")
    for page, module, words in commands()
  ],
)
def test_command_is_understood(module, words, monkeypatch):
  checked = []
  monkeypatch.setattr(
    train,
    "train_and_evaluate",
    lambda config, workdir: checked.append(config_lib.validate(config)) or done,
  )
  done = type("State", (), {"step": 10**9})
  for other, name in (
    (evaluate, "evaluate"),
    (sample, "sample"),
    (replay, "replay"),
  ):
    monkeypatch.setattr(other, name, lambda *args: checked.append(args))
  monkeypatch.setattr(processes, "initialize", lambda *_, **__: None)
  if module == "launch.local":
    words = [*words, "--dry-run"]
  code, output, errors = runs.call(module, *words, cwd=runs.ROOT)
  assert code == 0, errors
  assert checked or output.count("vitgan_jax.main") > 1


def anchors(page):
  """Returns the anchors of a page's headings, as GitHub makes them."""
  times = collections.Counter()
  found = set()
  for heading in re.findall(r"^#+ (.*)", _CODE.sub("", page.read_text()), re.M):
    name = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
    found.add(f"{name}-{times[name]}" if times[name] else name)
    times[name] += 1
  return found


@pytest.mark.parametrize("name", [x for x in PAGES if x.endswith(".md")])
def test_links_lead_somewhere(name):
  page = runs.ROOT / name
  for path, anchor in _LINK.findall(_CODE.sub("", page.read_text())):
    target = page.parent / path if path else page
    assert target.exists(), path
    assert not anchor or anchor in anchors(target), f"{path}#{anchor}"
