"""The real child, but for a decoder that misbehaves on the pictures named after a misdeed."""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

from core.datasets import child, images, normalise
from core.datasets.limits import Limits


def read_picture(data: bytes, name: str, limits: Limits) -> images.Picture:
    match name.rsplit("/", 1)[-1].split(".")[0]:
        case "segfault":
            ctypes.string_at(0)
        case "abort":
            os.abort()
        case "sleep":
            if os.fork() == 0:
                os.execv("/bin/sleep", ["sleep", "321"])
            time.sleep(600)
        case "spin":
            while True:
                pass
        case "hog":
            hog = [bytearray(2**20) for _ in range(2**20)]
            raise AssertionError(len(hog))
        case "flood":
            sys.stdout.write("x" * 2**27)
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "bug":
            raise ZeroDivisionError("a mistake of ours")
        case "environment":
            files = [Path(f"/proc/self/fd/{number}") for number in range(3, 1000)]
            seen = [str(file.readlink()) for file in files if file.is_symlink()]
            raise images.Rejected("seen", f"{sorted(os.environ)} {seen}")
        case "orphan":
            if os.fork() == 0:
                os.closerange(0, 100)
                os.execv("/bin/sleep", ["sleep", "321"])
    return images.read_picture(data, name, limits)


normalise.read_picture = read_picture
if __name__ == "__main__":
    child.main()
