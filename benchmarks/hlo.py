"""Reads the TPU compiler's text: scheduled HLO, and the bundles of a kernel.

Pure functions of text; nothing here needs JAX.
"""

import collections
import dataclasses
import math
import re

COLLECTIVES = (
  "all-reduce",
  "all-gather",
  "all-to-all",
  "collective-permute",
  "reduce-scatter",
)
_CALLS = {
  "call": r"to_apply=%([^\s,]+)",
  "async-start": r"calls=%([^\s,]+)",
  "while": r"body=%([^\s,]+)",
}
_BRANCHES = r"(?:true_computation|false_computation)=%([^\s,]+)"


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: without the %.
    type: of the result, text.
    opcode: as "fusion".
    operands: names of instructions of the same computation; a constant's is
      its value.
    operand_bytes: of all operands together, without padding.
    attributes: the text behind the operands.
  """

  name: str
  type: str
  opcode: str
  operands: tuple
  operand_bytes: int
  attributes: str

  @property
  def cycles(self):
    """The compiler's estimate, or None: it makes none for many."""
    cycles = self._find(r'"estimated_cycles":"(\d+)"')
    return cycles and int(cycles)

  @property
  def op_name(self):
    """Where in the program it comes from, "" where that is not known."""
    return self._find(r'op_name="([^"]*)"') or ""

  @property
  def is_kernel(self):
    """Whether it is a kernel of Pallas, whose cycles nobody estimates."""
    return 'custom_call_target="tpu_custom_call"' in self.attributes

  @property
  def cost(self):
    """{"flops": ..., "bytes_accessed": ...}, as a kernel declares it, or {}."""
    cost = self._find(r'"cost_estimate":\{([^}]*)\}') or ""
    return {k: int(n) for k, n in re.findall(r'"(\w+)":"(\d+)"', cost)}

  def _find(self, pattern):
    match = re.search(pattern, self.attributes)
    return match and match[1]


@dataclasses.dataclass(frozen=True)
class Execution:
  """How often an instruction runs, and within how many loops."""

  instruction: Instruction
  times: int
  loops: int


class Module:
  """A scheduled HLO module."""

  def __init__(self, text):
    """Parses `compiled.as_text()`.

    Args:
      text: of one module.

    Raises:
      ValueError: if it has no entry computation.
    """
    self.computations = collections.defaultdict(dict)
    self.entry = None
    # Loops whose trip count is not to be found; they count as one trip.
    self.unknown_loops = []
    current = None
    for line in text.splitlines():
      header = re.match(r"(ENTRY )?%(\S+) \(.*\{$", line)
      if header:
        current = self.computations[header[2]]
        if header[1]:
          self.entry = header[2]
      elif current is not None and re.match(r"\s+(ROOT )?%\S+ = ", line):
        instruction = _parse(line, current)
        current[instruction.name] = instruction
    if self.entry is None:
      raise ValueError("the text has no entry computation")

  def executions(self, cost):
    """Returns the list of `Execution`s of one call of the module.

    What is inside a fusion is part of it. Of the branches of a conditional
    the dearest counts.

    Args:
      cost: cycles of an `Instruction`, to choose branches by.
    """
    self.unknown_loops.clear()
    return list(self._walk(self.entry, 1, 0, cost))

  def _walk(self, computation, times, loops, cost):
    for instruction in self.computations[computation].values():
      opcode, attributes = instruction.opcode, instruction.attributes
      yield Execution(instruction, times, loops)
      if opcode == "conditional":
        names = re.findall(_BRANCHES, attributes)
        listed = re.search(r"branch_computations=\{([^}]*)\}", attributes)
        if listed:
          names = re.findall(r"%([^\s,]+)", listed[1])
        branches = [list(self._walk(n, times, loops, cost)) for n in names]
        yield from max(
          branches,
          key=lambda branch: sum(cost(x.instruction) * x.times for x in branch),
        )
      elif opcode in _CALLS and instruction.cycles is None:
        called = re.search(_CALLS[opcode], attributes)
        is_loop = opcode == "while"
        trips = self._trips(instruction) if is_loop else 1
        if called:
          yield from self._walk(called[1], times * trips, loops + is_loop, cost)

  def _trips(self, loop):
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
      return int(known[1])
    # JAX counts from 0 up to the one constant of the condition.
    condition = re.search(r"condition=%([^\s,]+)", loop.attributes)[1]
    constants = [
      x.operands[0]
      for x in self.computations[condition].values()
      if x.opcode == "constant" and x.type.startswith("s32[]")
    ]
    if len(constants) == 1 and constants[0].isdigit():
      return int(constants[0])
    self.unknown_loops.append(loop.name)
    return 1


def type_bytes(text):
  """Returns the bytes of a type, "(bf16[2,3]{1,0}, f32[])", without padding."""
  total = 0
  for name, bits, shape in re.findall(
    r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]", text
  ):
    size = math.prod(int(n) for n in shape.split(",") if n)
    total += size * (8 if name == "pred" else int(bits)) // 8
  return total


def bundles(text):
  """Returns the bundles that a kernel executes, or None if it cannot be read.

  A bundle is one very long instruction word: at least one cycle. Counted are
  all bundles of the final schedule, each as often as the loops around it run;
  skipped regions count too. A loop is taken to count from 0 up to the constant
  in its exit test.

  Args:
    text: of a dump `*-final_bundles.txt`.
  """
  trips = {}  # by depth, of the loops that the line is in
  total = 0
  for line in text.splitlines():
    bundle = re.match(r"\s*(?:0x[\da-f]+|0)\s+(\w\w)?\s*:\s*(>*)\s*\{", line)
    if not bundle:
      continue
    depth = len(bundle[2])
    if bundle[1] == "LB":
      trips[depth] = _kernel_trips(line, text)
      if trips[depth] is None:
        return None
    total += math.prod(trips.get(d, 1) for d in range(1, depth + 1))
  return total or None


def _kernel_trips(line, text):
  for region in re.findall(r"Start region (\d+)", line):
    branch = re.search(
      rf"sbr\.rel \(!(%\w+)\) target = \$region{region} ", text
    )
    if branch:
      test = re.search(
        rf"{branch[1]} = scmp\.ge\.s32\.totalorder %\w+, (\d+)", text
      )
      return test and int(test[1])
  return None


def _parse(line, others):
  name, rest = re.match(r"\s+(?:ROOT )?%(\S+) = (.*)", line).groups()
  end = _closing(rest, 0) + 1 if rest[0] == "(" else rest.index(" ")
  result, rest = rest[:end], rest[end + 1 :]
  start = rest.index("(")
  end = _closing(rest, start)
  text = re.sub(r"/\*.*?\*/", "", rest[start + 1 : end])
  operands = tuple(operand.strip().lstrip("%") for operand in text.split(","))
  return Instruction(
    name,
    result,
    rest[:start],
    operands,
    sum(type_bytes(others[x].type) for x in operands if x in others),
    rest[end + 1 :],
  )


def _closing(text, start):
  """Returns the index of the parenthesis that closes the one at `start`."""
  depth = 0
  for match in re.finditer(r"[()]", text[start:]):
    depth += 1 if match[0] == "(" else -1
    if not depth:
      return start + match.start()
  raise ValueError(f"unbalanced parentheses in {text[:80]!r}")
