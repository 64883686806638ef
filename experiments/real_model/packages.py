"""The Debian packages whose text the corpus is made of, and which of their files are read."""

import re
from typing import NamedTuple

_TEXT = (".rst", ".rst.txt", ".txt", ".pod", ".md")
_HTML = (".html", ".html.en")


class Package(NamedTuple):
    """A package's files, or those of its `.tar.xz` archives, that end in one of `endings`.

    Files may also end in .gz. `within` must be found in their paths and `without` not, both as
    regular expressions.
    """

    name: str
    endings: tuple[str, ...]
    within: str = ""
    without: str = "(?!)"

    def has(self, path: str) -> bool:
        """Returns whether the file at `path` below the unpacked package is read."""
        return (
            path.removesuffix(".gz").endswith(self.endings)
            and bool(re.search(self.within, path))
            and not re.search(self.without, path)
        )


_RUST_BOOKS = "book|edition-guide|embedded-book|nomicon|reference|rust-by-example|rustc|std"
_LINUX = "block|crypto|drivers/(base|char|md|nvme|pci|usb|virtio)|fs|include/linux|init|io_uring"
_LINUX += "|ipc|kernel|lib|mm|net|security|sound/core|tools/(lib|perf)|virt|arch/x86"
PACKAGES = {
    "documentation": (
        Package("linux-doc-6.1", _TEXT, "Documentation/", "/translations/"),
        Package("rust-doc", _HTML, f"/html/({_RUST_BOOKS})/"),
        Package("python3.11-doc", _TEXT),
        Package("postgresql-doc-15", _HTML),
        Package("debian-handbook", _HTML, "/en-US/"),
        Package("dict-gcide", (".dict.dz",)),
        Package("dict-foldoc", (".dict.dz",)),
        Package("anarchism", _HTML, "/html/"),
        Package("perl-doc", _TEXT),
        Package("llvm-15-doc", _TEXT),
        Package("ghc-doc", _TEXT, "/_sources/"),
        Package("sagemath-doc", _TEXT, "/html/en/"),
        Package("python-sympy-doc", _TEXT),
        Package("nodejs-doc", _HTML),
        Package("cmake-doc", _TEXT),
        Package("git-doc", _TEXT),
        Package("sqlite3-doc", _HTML),
        Package("apache2-doc", _HTML, "/manual/en/|[.]en$"),
        Package("maxima-doc", _HTML, "/maxima-doc/html/"),
        Package("octave-doc", _HTML, "/octave.html/"),
        Package("gimp-help-en", _HTML),
        Package("libreoffice-help-en-us", _HTML),
        Package("libgtk-3-doc", _HTML),
        Package("libglib2.0-doc", _HTML),
    ),
    "python": tuple(
        Package(name, (".py",))
        for name in (
            "libpython3.11-stdlib", "ansible-core", "calibre", "mercurial-common",
            "python3-astropy", "python3-dask", "python3-django", "python3-docutils",
            "python3-ipython", "python3-jedi", "python3-kivy", "python3-matplotlib",
            "python3-mypy", "python3-networkx", "python3-nltk", "python3-numba", "python3-numpy",
            "python3-pandas", "python3-scipy", "python3-setuptools", "python3-skimage",
            "python3-sklearn", "python3-sphinx", "python3-sqlalchemy", "python3-statsmodels",
            "python3-sympy", "python3-torch", "python3-tornado", "python3-twisted",
            "python3-xarray",
        )
    ),
    "c": (Package("linux-source-6.1", (".c", ".h"), f"^[^/]*/({_LINUX})/"),),
}  # fmt: skip
