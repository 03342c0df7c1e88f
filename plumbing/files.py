"""Files that are whole or not there, directories that are ours, and locks that end with their process."""
import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
from pathlib import Path

from plumbing.cli import UserError, shown, writable

MARK = ".nanokd"            # the file in each directory that we write to; it says of which kind
OURS = "nanoKD: runs"       # in each single file that we write
# kind: (in words, {its own files: keys of what is in them}, which tell one that was written before there were marks)
KINDS = {"run": ("a run of train.py", {"config.json": {"strategy"}}),
         "tokens": ("a token directory", {"manifest.json": {"sha256", "vocab_size"}}),
         "compare": ("a comparison", {"inputs.json": {"--data"}, "results.json": {"config", "results", "yardsticks"}}),
         "glue": ("finetune_glue.py's", {"glue.json": {"model", "tasks"}, "probes.json": {"tasks", "settings"},
                                         "trials/*.json": {"scores", "settings"}})}
# Names in a directory that is empty all the same: a disk's, a file manager's, of a claim that was killed
NOTHING = re.compile(rf"lost\+found|\.DS_Store|\.nfs\w+|{re.escape(MARK)}\.\d+\.part")


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


def json_object(file, remedy="get it again, or leave it out"):
    """The dict in a JSON file of another program's."""
    with parsing(file, remedy):
        return {**json.loads(file.read_text(encoding="utf-8") if file.is_file() else "")}


read_json = functools.partial(json_object, remedy="give another --out")             # one of our own files


def log_records(lines):
    """(line, what it says) of those of a log.jsonl's lines, as bytes, that train.py has written whole: a kill or a
    full disk leaves half a line."""
    for line in lines:
        with contextlib.suppress(AttributeError, LookupError, TypeError, ValueError, RecursionError):
            record = json.loads(line)
            values = [v for k, v in record.items() if k != "val"] + [*(record.get("val") or {}).values()]
            if all(isinstance(v, int | float | None) for v in values) and math.isfinite(
                    record["seconds"] + record.get("progress", 0)) and record["step"] // 1 == record["step"]:
                yield line, record


def write_whole(file, data, new=False):
    """Writes bytes under a temporary name, syncs, renames: `file` is the old one or the new one, never a part.
    `new`: one that is there already stays."""
    part, free = file.with_name(f"{file.name}.{os.getpid()}.part"), shutil.disk_usage(file.parent).free
    try:
        if free < len(data):
            raise OSError(errno.ENOSPC, "no space left")
        with open(part, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        with contextlib.suppress(OSError):                              # no hard links here: the last one wins
            if new:
                os.link(part, file)
        if not (new and file.exists()):
            os.replace(part, file)
        part.unlink(missing_ok=True)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise UserError(f"{file} could not be written ({e.strerror}): {len(data):,} bytes needed, {free:,} "
                        f"free; what was there before is intact") from None


def as_json(value):
    return (json.dumps(value, indent=1) + "\n").encode()


def write_json(file, value):
    write_whole(file, as_json(value))


def sha256(file):
    """Read once in a process, as long as its size and the time of its last change stay."""
    return digest(file.absolute(), file.stat().st_size, file.stat().st_mtime_ns)


@functools.cache
def digest(file, size, changed):
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def claim(path, kind, dry_run=False):
    """The Path of a directory that is ours and of this kind: made and marked, marked before, or known by its
    own files.  Refused where anything else is.  A dry run makes nothing."""
    if not str(path).strip():
        raise UserError("--out is empty: give the name of a directory")
    path, (what, own) = writable(path), KINDS[kind]
    mark = path / MARK
    others = [] if mark.exists() else sorted(p.name for p in path.glob("*") if not NOTHING.fullmatch(p.name))
    if others and not any(holds(file, keys) for pattern, keys in own.items() for file in path.glob(pattern)):
        raise UserError(f"--out {path} is neither empty nor {what} ({shown(others[0])} is there): nothing was "
                        f"touched; give a new directory")
    if not (dry_run or mark.exists()):
        path.mkdir(parents=True, exist_ok=True)
        write_whole(mark, f"{kind}\n".encode(), new=True)
    there = mark.read_text("utf-8", "replace").strip() if mark.exists() else kind
    if there != kind:
        raise UserError(f"--out {path} is {KINDS.get(there, [shown(there)])[0]}, not {what}: give another --out")
    return path


def holds(file, keys):
    """Whether it is a JSON object with these keys, and no model's config.json."""
    with contextlib.suppress(UserError, OSError):
        found = json_object(file)
        return keys <= found.keys() and "model_type" not in found
    return False


def claim_file(path):
    """The Path of a file to be written: new, or one that has OURS in it."""
    path = Path(path)
    if path.exists() and not (path.is_file() and OURS.encode() in path.read_bytes()):
        raise UserError(f"--out {path} is there and was not written by this program: nothing was touched; give "
                        f"another name")
    writable(path.parent)
    return path


@contextlib.contextmanager
def hold(path, kind):
    """Claims a directory, and holds it against other processes.  What was made for nothing goes again."""
    made = [each for each in (path, *path.parents) if not each.exists()]
    claim(path, kind)
    with lock(path / MARK) as ours:
        if not ours:
            raise UserError(f"--out {path}: another process is writing there: wait for it, or give another --out")
        try:
            yield path
        finally:
            with contextlib.suppress(OSError):
                if made and os.listdir(path) == [MARK]:
                    (path / MARK).unlink()
                    for each in made:
                        each.rmdir()


@contextlib.contextmanager
def lock(path):
    """Yields whether the file (made if it is not there) or directory is now ours.  The system unlocks it when
    its process dies.  Where nothing can be locked, one line says so, and it is ours."""
    path = Path(path)
    # NFS locks a file only where it is open for writing
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    ours = True
    try:
        try:
            import fcntl
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            ours = False
        except (ImportError, OSError):                                  # Windows, some network file systems
            print(f"{path} cannot be locked here: let no second process work on it", file=sys.stderr)
        yield ours
    finally:
        os.close(handle)


def claim_each(paths, do, directories=True):
    """[do(i) for each path], in any order: processes with the same paths take what no other one works on, and wait for
    the rest, which `do` finds finished.  `directories` are made where there are none; else the paths are lock files."""
    results, waiting = {}, range(len(paths))
    for path in paths if directories else ():
        Path(path).mkdir(parents=True, exist_ok=True)

    def done(i):
        with lock(paths[i]) as ours:
            if ours:
                results[i] = do(i)
        return ours
    while waiting := [i for i in waiting if not done(i)]:
        time.sleep(1)
    return [results[i] for i in range(len(paths))]
