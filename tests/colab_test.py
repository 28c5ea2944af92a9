"""Tests of the notebook: as a file, and run from its first cell to its last."""

import ast
import base64
import importlib
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from tests import runs

PATH = runs.ROOT / "launch" / "colab" / "vitgan.ipynb"
_HOW = "not installed: pip install -e '.[test]'"


@pytest.fixture(scope="module")
def notebook():
  return json.loads(PATH.read_text())


def sources(notebook):
  """Returns {id: source} of the code cells, without the lines for a shell."""
  return {
    cell["id"]: re.sub(
      r"^( *)[!%].*$", r"\1pass", "".join(cell["source"]), flags=re.MULTILINE
    )
    for cell in notebook["cells"]
    if cell["cell_type"] == "code"
  }


def test_file_is_a_valid_notebook_for_colab(notebook):
  nbformat = pytest.importorskip("nbformat", reason=f"nbformat is {_HOW}")
  nbformat.validate(notebook)
  assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
  assert {"accelerator", "colab", "kernelspec"} <= notebook["metadata"].keys()
  assert len({cell["id"] for cell in notebook["cells"]}) == len(
    notebook["cells"]
  )


def test_file_holds_no_outputs(notebook):
  for cell in notebook["cells"]:
    assert not cell.get("outputs") and not cell.get("execution_count")
  assert PATH.stat().st_size < 20_000


def test_cells_use_only_what_is_there(notebook):
  """Follows names from their imports to attributes of modules, and calls."""
  pytest.importorskip("IPython", reason=f"IPython is {_HOW}")
  modules = {}
  num_attributes = num_calls = 0
  for source in sources(notebook).values():
    for node in ast.walk(ast.parse(source)):
      if isinstance(node, ast.Import):
        for name in node.names:
          importlib.import_module(name.name)
      elif isinstance(node, ast.ImportFrom):
        for name in node.names:
          try:
            value = importlib.import_module(f"{node.module}.{name.name}")
          except ModuleNotFoundError:
            value = getattr(importlib.import_module(node.module), name.name)
          modules[name.asname or name.name] = value
    for node in ast.walk(ast.parse(source)):
      if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        if node.value.id in modules:
          assert hasattr(modules[node.value.id], node.attr), ast.unparse(node)
          num_attributes += 1
      if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id in modules
      ):
        called = getattr(modules[node.func.value.id], node.func.attr)
        keywords = {keyword.arg: None for keyword in node.keywords}
        # Raises a TypeError where they do not fit.
        inspect.signature(called).bind(*node.args, **keywords)
        num_calls += 1
  assert num_attributes > 10 and num_calls > 10


_EXECUTE = """
import sys

import nbclient
import nbformat

notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=500, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[1])
"""


@pytest.mark.slow
def test_notebook_runs_from_a_clean_kernel(notebook, tmp_path):
  for name in ("nbclient", "nbformat", "ipykernel"):
    pytest.importorskip(name, reason=f"{name} is {_HOW}")
  # As opened in the checkout: the folder is found above that of the notebook.
  for name in ("configs", "vitgan_jax", "launch"):
    shutil.copytree(runs.ROOT / name, tmp_path / name)
  path = tmp_path / "launch" / "colab" / "vitgan.ipynb"
  (cell,) = [x for x in notebook["cells"] if x["id"] == "parameters"]
  cell["source"] = (
    'CONFIG, WORKDIR = "configs/digits.py:smoke", "runs/smoke"\n'
    "KIMG, NUM_SCORED = 0.064, 1300\n"
  )
  path.write_text(json.dumps(notebook))
  process = subprocess.run(
    [sys.executable, "-c", _EXECUTE, path],
    cwd=path.parent,
    env={**os.environ, "IPYTHONDIR": str(tmp_path / "ipython")},
    capture_output=True,
    text=True,
    timeout=900,
  )
  assert process.returncode == 0, process.stderr[-4000:]
  executed = json.loads(path.read_text())
  outputs = {cell["id"]: cell.get("outputs") for cell in executed["cells"]}
  pictures, texts = {}, {}
  for name, cell_outputs in outputs.items():
    for output in cell_outputs or ():
      data = output.get("data", {})
      texts.setdefault(name, []).extend(
        [output.get("text", ""), data.get("text/plain", "")]
      )
      if "image/png" in data:
        png = base64.b64decode(data["image/png"])
        pictures[name] = np.asarray(Image.open(io.BytesIO(png)))
  texts = {name: "".join(map("".join, text)) for name, text in texts.items()}
  assert pictures.keys() == {
    "train",
    "sample",
    "interpolate",
    "attention",
    "sigma",
    "curves",
  }
  for picture in pictures.values():
    assert picture.std() > 1 and min(picture.shape[:2]) >= 200
  # The grid that training showed last is that of the finished run.
  newest = np.asarray(Image.open(tmp_path / "runs" / "smoke" / "grid.png"))
  np.testing.assert_array_equal(pictures["train"], newest)
  assert "Done." in texts["train"] and "Step 8 on" in texts["load"]
  assert "diversity/std_over_latents" in texts["sigma"]
  assert "fd_efficientnet" in texts["score"]
