"""What `file_ops` runs inside the jail: a program by itself, which reads one request on stdin and answers on stdout.

It imports nothing of the gateway, which is not there. What it refuses is for its caller's sake; what holds is the jail.
"""

from __future__ import annotations

import errno
import fnmatch
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

ROOT = "/workspace"
MOST_ENTRIES = 1_000
MOST_LOOKED_AT = 20_000
LONGEST_LINE = 400

NAMED = {
    errno.ENOENT: ("not_found", "There is nothing at this path."),
    errno.EEXIST: ("exists", "Something is at this path already."),
    errno.ENOTDIR: ("not_a_folder", "A part of this path is no folder."),
    errno.EISDIR: ("is_a_folder", "This is a folder."),
    errno.ENOTEMPTY: ("not_empty", "The folder is not empty; say recursive to delete what it holds."),
    errno.EFBIG: ("workspace_full", "There is no room for this in the workspace."),
    errno.ENOSPC: ("workspace_full", "There is no room for this in the workspace."),
    errno.EACCES: ("not_permitted", "The file's permissions do not allow this."),
    errno.EPERM: ("not_permitted", "The file's permissions do not allow this."),
    errno.EROFS: ("outside", "Only files in /workspace can be changed."),
    errno.ELOOP: ("link_loop", "The links at this path lead in a circle."),
    errno.ENAMETOOLONG: ("path_too_long", "The path is too long."),
    errno.ENXIO: ("not_a_file", "This is neither a file nor a folder."),
}


class Refused(Exception):
    """What the caller is told: a code and a sentence."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


def inside(path: str, *, follow: bool) -> str:
    """Return where a path is, in the workspace; a link at its end is followed, or is what is meant."""
    if "\0" in path:
        raise Refused("invalid_path", "A path must not hold the character NUL.")
    whole = os.path.normpath(os.path.join(ROOT, path))
    folder, name = os.path.split(whole)
    found = os.path.realpath(whole) if follow or whole == ROOT else os.path.join(os.path.realpath(folder), name)
    if found != ROOT and not found.startswith(ROOT + "/"):
        raise Refused("outside", "The path leads out of /workspace.")
    return found


def shown(path: str) -> str:
    """Return a path as its caller writes it."""
    return os.path.relpath(path, ROOT)


def kind_of(mode: int) -> str:
    """Return a word for what a file is."""
    if stat.S_ISLNK(mode):
        return "link"
    if stat.S_ISDIR(mode):
        return "folder"
    return "file" if stat.S_ISREG(mode) else "other"


def described(path: str) -> dict[str, Any]:
    """Return what is known of a file without opening it."""
    found = os.lstat(path)
    kind = kind_of(found.st_mode)
    about: dict[str, Any] = {"path": shown(path), "type": kind, "modified": int(found.st_mtime)}
    if kind == "file":
        about["size"] = found.st_size
    if kind == "link":
        about["target"] = os.readlink(path)
    return about


def opened(path: str, flags: int) -> int:
    """Open an ordinary file; a pipe is not waited for."""
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "")
    raise OSError(errno.ENXIO, "")


def text_of(data: bytes, *, at_start: bool, at_end: bool) -> tuple[int, str]:
    """Return bytes as text, and how many were left out before it: what a cut left of a character at either end."""
    if b"\0" in data:
        raise Refused("binary", "This is no text: it holds NUL bytes.")
    whole = data if at_start else data.lstrip(bytes(range(0x80, 0xC0)))
    try:
        return len(data) - len(whole), whole.decode()
    except UnicodeDecodeError as error:
        if not at_end and error.end == len(whole) and error.reason == "unexpected end of data":
            return len(data) - len(whole), whole[: error.start].decode()
        raise Refused("binary", f"This is no text: it is not UTF-8 at byte {error.start}.") from None


def read(request: dict[str, Any]) -> dict[str, Any]:
    """Return a part of a text file."""
    path, offset, most = inside(request["path"], follow=True), request.get("offset", 0), request["most"]
    with os.fdopen(opened(path, os.O_RDONLY), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(offset)
        data = file.read(max(4, min(request.get("limit", most), most)))
    while True:
        skipped, content = text_of(data, at_start=offset == 0, at_end=offset + len(data) >= size)
        if len(json.dumps(content, ensure_ascii=False).encode()) <= most:
            break
        data = data[: len(data) // 2]
    end = offset + skipped + len(content.encode())
    about = {"path": shown(path), "content": content, "size": size, "offset": offset, "truncated": end < size}
    return about | ({"next_offset": end} if end < size else {})


def write(request: dict[str, Any]) -> dict[str, Any]:
    """Make a file, or replace what it holds as a whole: whoever reads it meanwhile sees the old or the new."""
    path, data = inside(request["path"], follow=True), request["content"].encode()
    folder, name = os.path.split(path)
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, "")
    os.makedirs(folder, exist_ok=True)
    draft = os.path.join(folder, f".{name[:100]}.{os.getpid()}.draft")
    try:
        with open(draft, "xb") as file:
            file.write(data)
        if os.path.exists(path):
            os.chmod(draft, stat.S_IMODE(os.stat(path).st_mode))
        os.replace(draft, path)
    except BaseException:
        if os.path.lexists(draft):
            os.unlink(draft)
        raise
    return {"path": shown(path), "size": len(data)}


def append(request: dict[str, Any]) -> dict[str, Any]:
    """Add text to the end of a file, which is made if it is not there."""
    path, data = inside(request["path"], follow=True), request["content"].encode()
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with os.fdopen(opened(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab") as file:
        before = os.fstat(file.fileno()).st_size
        try:
            file.write(data)
            file.flush()
        except OSError:
            os.ftruncate(file.fileno(), before)
            raise
    return {"path": shown(path), "size": before + len(data)}


def listed(request: dict[str, Any]) -> dict[str, Any]:
    """Return what a folder holds."""
    path = inside(request.get("path", "."), follow=True)
    names = sorted(os.listdir(path))
    return {
        "path": shown(path),
        "entries": [described(os.path.join(path, name)) for name in names[:MOST_ENTRIES]],
        "truncated": len(names) > MOST_ENTRIES,
    }


def delete(request: dict[str, Any]) -> dict[str, Any]:
    """Delete a file or link, or a folder; the workspace itself stays."""
    path = inside(request["path"], follow=False)
    if path == ROOT:
        raise Refused("invalid_path", "The workspace itself cannot be deleted.")
    if stat.S_ISDIR(os.lstat(path).st_mode):
        if request.get("recursive"):
            # Programs that go by descriptors: no depth of folders is too much for them.
            for command in (["chmod", "-R", "u+rwX"], ["rm", "-r", "-f"]):
                subprocess.run([*command, "--", path], check=False, stderr=subprocess.DEVNULL)
            if os.path.lexists(path):
                raise Refused("failed", "Not all of it could be deleted.")
        else:
            os.rmdir(path)
    else:
        os.unlink(path)
    return {"path": shown(path), "deleted": True}


def move(request: dict[str, Any]) -> dict[str, Any]:
    """Give a file or folder another path."""
    path, target = inside(request["path"], follow=False), inside(request["to"], follow=False)
    if path == ROOT or (target + "/").startswith(path + "/"):
        raise Refused("invalid_path", "A folder cannot be moved into itself.")
    if os.path.lexists(target) and not request.get("overwrite"):
        raise FileExistsError(errno.EEXIST, "")
    os.makedirs(os.path.dirname(target), exist_ok=True)
    os.rename(path, target)
    return {"path": shown(path), "to": shown(target)}


def mkdir(request: dict[str, Any]) -> dict[str, Any]:
    """Make a folder, with those above it."""
    path = inside(request["path"], follow=True)
    os.makedirs(path, exist_ok=True)
    return {"path": shown(path), "type": "folder"}


def about(request: dict[str, Any]) -> dict[str, Any]:
    """Say what is at a path."""
    return described(inside(request["path"], follow=False))


def files_below(path: str) -> Iterator[str]:
    """Yield ordinary files, without following links."""
    if not os.path.isdir(path):
        yield path
        return
    for folder, folders, names in os.walk(path):
        folders.sort()
        for name in sorted(names):
            yield os.path.join(folder, name)


def search(request: dict[str, Any]) -> dict[str, Any]:
    """Find lines that hold a text, or (without one) files by their name."""
    path, needle = inside(request.get("path", "."), follow=True), request.get("text", "")
    pattern, room = request.get("glob", "*"), request["most"] // 2
    os.lstat(path)
    found: list[dict[str, Any]] = []
    is_cut = False
    for number, file in enumerate(files_below(path)):
        is_cut = is_cut or number >= MOST_LOOKED_AT or len(found) >= MOST_ENTRIES or room < 0
        if is_cut:
            break
        name = shown(file)
        if not (fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(os.path.basename(name), pattern)):
            continue
        for match in matches(file, needle):
            item = {"path": name, **match}
            room -= len(json.dumps(item))
            if room < 0 or len(found) >= MOST_ENTRIES:
                is_cut = True
                break
            found.append(item)
    return {"matches": found, "truncated": is_cut}


def matches(path: str, needle: str) -> Iterator[dict[str, Any]]:
    """Yield the lines of a text file that hold a text; one match without a line where no text is looked for."""
    if not needle:
        if stat.S_ISREG(os.lstat(path).st_mode):
            yield {}
        return
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return
        with os.fdopen(opened(path, os.O_RDONLY | os.O_NOFOLLOW), "r", encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if needle in line:
                    yield {"line": number, "text": line.rstrip("\r\n")[:LONGEST_LINE]}
    except (OSError, UnicodeDecodeError):
        return  # a file that is no text, or may not be read, has no lines


OPERATIONS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "read": read,
    "write": write,
    "append": append,
    "list": listed,
    "delete": delete,
    "move": move,
    "mkdir": mkdir,
    "search": search,
    "stat": about,
}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Do what is asked; a refusal is an answer."""
    try:
        return OPERATIONS[request["operation"]](request)
    except Refused as refused:
        code, message = refused.code, refused.message
    except OSError as error:
        code, message = NAMED.get(error.errno or 0, ("failed", f"The system refused: {os.strerror(error.errno or 0)}."))
    except UnicodeError:
        code, message = "invalid_request", "Text and paths must be Unicode."
    except (MemoryError, RecursionError):
        code, message = "too_large", "This is more than one call may hold in memory."
    return {"error": {"code": code, "message": message}}


if __name__ == "__main__":
    sys.stdout.buffer.write(json.dumps(answer(json.load(sys.stdin)), ensure_ascii=False).encode("utf-8", "replace"))
