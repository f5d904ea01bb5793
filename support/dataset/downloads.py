"""Data sets from their authors' hosts: `python data.py scienceqa`, `python data.py mathvista`.

ScienceQA (Lu et al., arXiv 2209.09513) from its repository and its bucket, MathVista's testmini (Lu
et al., arXiv 2310.02255) from the Hub. A download that was cut off goes on where it was, checksums
are compared where there is one on record, and no archive writes outside its folder.

Left out on purpose: ScienceQA's parquet files on the Hub, which have no problem ids, so captions
and published features cannot be joined to them; checkpoints (checkpoints/hub.py).
"""

import argparse
import errno
import functools
import http.client
import os
import stat
import tempfile
import time
import urllib.request
import zipfile
from pathlib import Path, PurePosixPath

from support import files

_REPOSITORY = "https://raw.githubusercontent.com/lupantech/ScienceQA"
_COMMIT = "2cbf8318e07b9ece895bb2ae605e71e38d623264"
_IMAGES = "https://scienceqa.s3.us-west-1.amazonaws.com/images"
SCIENCEQA = {  # file: address, checksum (a git blob id or a sha256; None: nobody recorded one yet)
    "problems.json": (
        f"{_REPOSITORY}/{_COMMIT}/data/scienceqa/problems.json",
        "3920b762556abfbfa001f298c9740c36d4e041e1",
    ),
    "pid_splits.json": (
        f"{_REPOSITORY}/{_COMMIT}/data/scienceqa/pid_splits.json",
        "bde005092576ebebfed08087879ff774fcd75b62",
    ),
    "captions.json": (
        f"{_REPOSITORY}/{_COMMIT}/data/captions.json",
        "38726c2097b97e73b95582857c95de225f6682a8",
    ),
    "train.zip": (f"{_IMAGES}/train.zip", None),
    "val.zip": (f"{_IMAGES}/val.zip", None),
    "test.zip": (f"{_IMAGES}/test.zip", None),
}


def download(url, path, checksum=None, attempts=5):
    """Fetch url into path by way of path.part, where a later call goes on (HTTP Range).

    Raises ConnectionError, or ValueError for a wrong checksum. path appears only when complete.
    """
    part = Path(f"{path}.part")
    for attempt in range(1, attempts + 1):
        try:
            _fetch(url, part)
            break
        except (OSError, http.client.HTTPException) as error:
            code = getattr(error, "code", 0)
            if attempt == attempts or (400 <= code < 500 and code != 416):
                advice = "Try again later, or give another address with --addresses."
                raise ConnectionError(f"{url} could not be fetched ({error}). {advice}") from None
            if code == 416:  # the part is longer than the file, or was whole: start again
                part.unlink(missing_ok=True)
            time.sleep(attempt / 2)
    found = files.checksum(part, checksum)
    if checksum is None:
        print(f"{path.name} has sha256 {found}; there is none on record to compare it with.")
    elif found != checksum:
        part.unlink()
        raise ValueError(f"{url} has checksum {found}, not {checksum}; what came was deleted.")
    os.replace(part, path)


def _fetch(url, part):
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=60) as reply:
        if not reply.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            have = 0  # the server sends the whole file
        length = reply.headers.get("Content-Length", "0")
        total = have + (int(length) if length.isdecimal() else 0)
        start, first = time.monotonic(), have
        with open(part, "ab" if have else "wb") as file:
            while block := reply.read(1 << 20):
                have += file.write(block)
                files.progress(
                    f"{part.stem}, MB", (have - first) / 1e6, (total - first) / 1e6, start
                )
    if have < total:  # http.client is silent about it
        raise ConnectionError(f"the connection was lost after {have} of {total} bytes")


def unpack(archive, folder, top):
    """Unzip the archive's folder `top` as folder/top.

    Nothing is unpacked, and ValueError says why, if an entry would leave the folder (an absolute
    path, a drive, "..", a symbolic link), or if all would take over a hundred times the archive's
    size: pictures hardly shrink, a bomb says a thousand times, and no entry gets more than it says.
    """
    size, most = os.path.getsize(files.regular_file(archive)), 100
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        try:
            with zipfile.ZipFile(archive) as file:
                for entry in file.infolist():
                    name = PurePosixPath(entry.filename.replace("\\", "/"))
                    leaves = name.is_absolute() or ".." in name.parts or ":" in entry.filename
                    if leaves or stat.S_ISLNK(entry.external_attr >> 16):
                        raise ValueError(f"{entry.filename!r:.60} would leave the folder")
                if sum(entry.file_size for entry in file.infolist()) > most * size:
                    raise ValueError(f"it would unpack to over {most} times its size")
                file.extractall(temporary)
        except Exception as error:  # zipfile's, the decompressors', RuntimeError if encrypted
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EACCES, errno.EIO):
                raise  # not the archive's fault
            raise ValueError(f"{archive} is not a whole zip file ({error}); delete it.") from None
        if not Path(temporary, top).is_dir():
            raise ValueError(f"{archive} has no folder {top}.")
        os.replace(Path(temporary, top), Path(folder, top))


def download_mathvista(folder):
    """MathVista's testmini and all 6,141 pictures (0.9 GB) from the Hub into `folder`."""
    from huggingface_hub import hf_hub_download

    folder = Path(folder)
    fetch = functools.partial(
        hf_hub_download,
        "AI4Math/MathVista",
        repo_type="dataset",
        revision="2b6ad69445fbb5695c9b165475e8decdbeb97747",
        local_dir=folder,
    )
    try:
        if not (folder / "images").is_dir():
            unpack(fetch("images.zip"), folder, "images")
            (folder / "images.zip").unlink()
        fetch("annot_testmini.json")  # last: with it the folder counts as MathVista
    except ValueError:
        raise  # a broken archive, said by unpack
    except Exception as error:  # the client raises its HTTP library's own errors when offline
        raise ConnectionError(f"AI4Math/MathVista could not be fetched ({error}).") from None


def download_scienceqa(folder, addresses):
    """ScienceQA into `folder`, as data.load reads it; addresses is a table like SCIENCEQA."""
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, (url, checksum) in addresses.items():
        path, images = folder / name, folder / "images" / Path(name).stem
        if images.is_dir():
            continue
        if not path.is_file():
            download(url, path, checksum)
        if path.suffix == ".zip":
            unpack(path, images.parent, images.name)
            path.unlink()


def command(argv=None):
    """Download what the command line says; the folder it is in."""
    parser = argparse.ArgumentParser(description="Download a data set from its authors' hosts.")
    parser.add_argument("name", choices=["scienceqa", "mathvista"], help="the data set")
    parser.add_argument("--to", metavar="DIR", help="folder (default: what --data NAME reads)")
    where = 'JSON {"train.zip": [address, checksum or null], ...} that replaces built-in addresses'
    parser.add_argument("--addresses", metavar="FILE", help=f"scienceqa: {where}")
    args = parser.parse_args(argv)
    folder = Path(args.to) if args.to else files.cache_folder() / args.name
    changed = addresses(args.addresses) if args.addresses else {}
    if args.name == "mathvista":
        download_mathvista(folder)
    else:
        download_scienceqa(folder, SCIENCEQA | changed)
    return folder


def addresses(file):
    """A table of other addresses for some of SCIENCEQA's files, checked."""
    changed = files.field({"table": files.read_json(file)}, "table", dict, file)
    for name, entry in changed.items():
        if name not in SCIENCEQA:
            raise ValueError(f"{file}: {name:.60} is none of {', '.join(SCIENCEQA)}.")
        pair = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        if not isinstance(pair[0], str) or not isinstance(pair[1], str | None):
            raise ValueError(f"{file}: {name} is not [address, checksum or null].")
    return changed
