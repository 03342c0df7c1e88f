"""Files that are whole or not there, and locks that end with their process.

One atomic writer, one lock, one wait loop: for checkpoints, model directories, trials,
tables and token directories.
"""
import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

from plumbing.cli import UserError, shown


@contextlib.contextmanager
def parsing(file, remedy="get it again, or leave it out"):
    """Whatever goes wrong inside is the file's fault, and one line says so.  It wraps a call that returns plain
    values: never a generator, an allocation, a model or a step."""
    try:
        yield
    except (UserError, OSError, MemoryError):
        raise
    except Exception as e:
        if type(e).__name__ == "OutOfMemoryError":                      # torch's, which need not be imported here
            raise
        raise UserError(f"{shown(file)} is damaged or not ours ({type(e).__name__}: {shown(e, 100)}): "
                        f"{remedy}") from e


def write_whole(file, data):
    """Writes bytes under a temporary name, syncs, renames: `file` is the old one or the
    new one, never a part."""
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    free = shutil.disk_usage(file.parent).free
    try:
        if free < len(data):
            raise OSError(errno.ENOSPC, "no space left")
        with open(part, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, file)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise UserError(f"{file} could not be written ({e.strerror}): {len(data):,} bytes needed, {free:,} "
                        f"free; what was there before is intact") from None


def write_json(file, value):
    write_whole(file, (json.dumps(value, indent=1) + "\n").encode())


def read_json(file):
    """The dict in one of our own files."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (FileNotFoundError, TypeError, ValueError):
        raise UserError(f"{file} is missing or damaged, so what {file.parent} holds cannot be told: give "
                        f"another --out, or remove that directory") from None


def sha256(file):
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@contextlib.contextmanager
def lock(path):
    """Yields whether the file (made if it is not there) or directory is now ours.  The system unlocks it when
    its process dies.  Where nothing can be locked, one line says so, and it is ours."""
    path = Path(path)
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDONLY | os.O_CREAT, 0o666)
    try:
        try:
            import fcntl
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = True
        except BlockingIOError:
            ours = False
        except (ImportError, OSError):                                  # Windows, some network file systems
            print(f"{path} cannot be locked here: let no second process work on it", file=sys.stderr)
            ours = True
        yield ours
    finally:
        os.close(handle)


def share(paths, do):
    """[do(i) for each path], in any order: processes with the same paths take what no other one works on, and
    wait for the rest.  What another process has done, `do` finds finished."""
    results, waiting = {}, range(len(paths))

    def done(i):
        with lock(paths[i]) as ours:
            if ours:
                results[i] = do(i)
        return ours
    while waiting := [i for i in waiting if not done(i)]:
        time.sleep(1)
    return [results[i] for i in range(len(paths))]


def share_runs(directories, do):
    """The same of directories, which are made where they are not there."""
    for directory in directories:
        Path(directory).mkdir(parents=True, exist_ok=True)
    return share(directories, do)
