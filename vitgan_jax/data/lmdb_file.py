"""Reads an LMDB without its library.

The library maps the file into memory and trusts what is in it: a file that was
cut off, or has a wrong number in it, ends the process. Here it is an error.

The format is that of LMDB 0.9 on machines of 64 bits: the pages of a tree. A
node of a branch has the number of the page below it; that of a leaf has a key
and its value, or the number of the first page of a large value.
"""

import array
import os
import struct

import numpy as np

_HEADER = struct.Struct("<QHHHH")  # of a page: _, _, flags, end of starts, _
_BRANCH, _LEAF = 1, 2  # flags of a page
_NODE = struct.Struct("<HHHH")  # low and high half of its size, flags, key size
_LARGE = 1  # flag of a node
# Magic number, version, size of a page, first page of the tree, transaction.
_META = struct.Struct("<II 16x I 84x Q 8x Q")
_MAGIC = 0xBEEFC0DE
_EMPTY = 2**64 - 1


class LmdbFile:
  """The keys and values of an LMDB.

  Attributes:
    keys: np.bytes_ [N], sorted.
  """

  def __init__(self, path):
    """Lists the keys.

    Args:
      path: of `data.mdb`.

    Raises:
      ValueError: if it is none, or damaged.
    """
    self._path = path
    self._offsets, self._sizes = array.array("Q"), array.array("Q")
    try:
      with open(path, "rb") as file:
        # Millions of them: as an array they take a third of the memory.
        self.keys = np.array(self._list(file), np.bytes_)
    except struct.error as error:
      raise ValueError("it is cut off, or damaged") from error

  def _list(self, file):
    """Returns the keys; notes where their values are."""
    page_bytes, _, _ = _meta(file, 0)
    # A transaction writes over the one of the transaction before the last.
    metas = [_meta(file, i * page_bytes) for i in (0, 1)]
    _, root, _ = max(metas, key=lambda meta: meta[2])
    file_bytes = os.fstat(file.fileno()).st_size
    keys, seen = [], set()
    waiting = [] if root == _EMPTY else [root]
    while waiting:
      offset = waiting.pop() * page_bytes
      if offset in seen or offset >= file_bytes:
        raise ValueError(f"its tree leads to {offset}, where no page is")
      seen.add(offset)
      page = os.pread(file.fileno(), page_bytes, offset)
      _, _, flags, end, _ = _HEADER.unpack_from(page)
      count = (end - _HEADER.size) // 2
      starts = struct.unpack_from(f"<{count}H", page, _HEADER.size)
      nodes = [_NODE.unpack_from(page, start) for start in starts]
      if flags & _BRANCH:
        children = [
          low + (high << 16) + (top << 32) for low, high, top, _ in nodes
        ]
        waiting.extend(reversed(children))
      elif flags & _LEAF:
        for start, (low, high, kind, key_bytes) in zip(starts, nodes):
          key = start + _NODE.size
          value = key + key_bytes
          keys.append(page[key:value])
          if kind & _LARGE:
            (first,) = struct.unpack_from("<Q", page, value)
            value = first * page_bytes + _HEADER.size
          else:
            value += offset
          size = low + (high << 16)
          is_there = value + size <= file_bytes
          self._offsets.append(value if is_there else 0)
          self._sizes.append(size if is_there else 0)
      else:
        raise ValueError(f"page {offset // page_bytes} is of another kind")
    return keys

  def read(self, index):
    """Returns the value of a key; b"" where the file is cut off before it."""
    with open(self._path, "rb") as file:
      return os.pread(file.fileno(), self._sizes[index], self._offsets[index])


def _meta(file, offset):
  """Returns the size of a page, the root and the number of a transaction."""
  content = os.pread(file.fileno(), _META.size, offset + _HEADER.size)
  magic, version, *rest = _META.unpack(content)
  if (magic, version) != (_MAGIC, 1):
    raise ValueError("it is no LMDB of version 1 and 64 bits")
  return rest
