"""Write a model or adapter directory in one process, tensor by tensor: tools/merge.py and tools/export.py.

Memory holds about three tensors at a time: one that is computed, one that waits, one that is written.
"""

import contextlib
import math
import os

from disk import checkpoint, files, pretrained, saving, writer
from settings.errors import UserError

FILE_BYTES = 5 * 10**9  # of a weight file, unless one tensor is larger


def check_new(out):
    """Raise UserError if a directory that is to be written exists, or the one that is its name until then.

    Or if it would be inside a step directory, which --keep_checkpoints may delete.
    """
    outer = os.path.dirname(os.path.realpath(out))
    if os.path.isdir(os.path.join(outer, checkpoint.STATE_DIRECTORY)):
        raise UserError(f"{out} would be inside the step directory {outer}, which a run may delete; choose "
                        "another place")
    if os.path.lexists(out):
        raise UserError(f"{out} exists already; choose a new directory")
    if os.path.lexists(temporary_name(out)):  # it may be somebody's
        raise UserError(f"{temporary_name(out)} exists already, perhaps of a merge or an export that was "
                        "interrupted; remove it, or choose another directory")


def temporary_name(out):
    return out.rstrip("/") + ".tmp"


@contextlib.contextmanager
def new_directory(out):
    """A new directory that gets the name `out` when the block ends, and is removed if the block raises.

    Raises UserError as check_new does.
    """
    check_new(out)
    temporary = temporary_name(out)
    os.makedirs(temporary)
    try:
        yield temporary
        files.sync(temporary)
        os.replace(temporary, out)
    finally:
        if os.path.isdir(temporary):
            files.remove(temporary)


def write_files(directory, contents):
    """Write {name: bytes or JSON value}; a name may be in a folder."""
    for name, content in contents.items():
        os.makedirs(os.path.dirname(os.path.join(directory, name)), exist_ok=True)
        files.write_file(os.path.join(directory, name), content)


def write_weights(directory, stored, tensor_of, file_bytes):
    """Write the weight files of a model, and their index if there are several.

    stored      {name in the files: (dtype code, shape)}
    tensor_of   a function: such a name -> the tensor or CopiedTensor. Called once for each, in the order of
                the files
    file_bytes  the most that a file has, unless one tensor is larger
    """
    sizes = {name: math.prod(shape) * pretrained.BITS[code] // 8 for name, (code, shape) in stored.items()}
    names_by_file = saving.fill_files(sizes, "model", file_bytes)
    for file, names in names_by_file.items():
        of_file = {name: stored[name] for name in names}
        writer.write_tensors(os.path.join(directory, file), of_file, tensor_of)
    if len(names_by_file) > 1:
        files.write_file(os.path.join(directory, pretrained.INDEX_FILE),
                         saving.index_content(names_by_file, sum(sizes.values())))
