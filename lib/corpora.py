"""
Corpora on Hugging Face's hub: which ones there are, and how their files are fetched and verified.

The downloads are huggingface_hub's. Its cache, mirrors (HF_ENDPOINT), access tokens (HF_TOKEN) and
offline mode (HF_HUB_OFFLINE) apply. huggingface_hub resumes a file within one process alone. Here a
later process goes on, too: what came so far stays beside the cache's files as SHA256.part.
"""
import contextlib
import hashlib
import os
import shutil
from dataclasses import dataclass, field

from lib.console import fail

MB = 1_000_000   # bytes, as disks are sold
PART = '.part'   # suffix in the cache of a file that is not complete yet


@dataclass
class Corpus:
    """A corpus on the hub."""
    title: str      # the name that meta.json gives to the source
    repo: str       # OWNER/NAME of the dataset
    revision: str   # the commit, so that everybody trains on the same tokens
    train: str      # name of a training file; of a shard, with its number
    val: str        # name of the validation file
    shards: int = 0   # training shards; 0: both files are plain text
    sha256: dict = field(default_factory=dict)   # {file: SHA-256} of what a first try fetches


CORPORA = {
    'fineweb': Corpus(
        "FineWeb's sample of 10 billion tokens", 'kjj0/fineweb10B-gpt2',
        '889765ea1f903759787add96995d81171b632d0c',
        'fineweb_train_{:06d}.bin', 'fineweb_val_000000.bin', 103, {
            'fineweb_train_000001.bin':
                '771fa4a99b9fe0946ffb6e848b4ba5c6a9b0fe87860ebf03bc2c1c7e45f8178e',
            'fineweb_val_000000.bin':
                '5b95c8e0966f0861685b307b23dc5ae42b228ef74b28cb499784ae021f201640'}),
    # The commit of this one could not be looked up. The first download notes the commit that the
    # hub names, later ones use it, and each file must have the SHA-256 that the hub gives for it.
    'fineweb_edu': Corpus(
        "FineWeb-Edu's sample of 10 billion tokens", 'kjj0/finewebedu10B-gpt2', 'main',
        'finewebedu_train_{:06d}.bin', 'finewebedu_val_000000.bin', 99),
    'tinystories': Corpus(
        'TinyStories V2, written by GPT-4', 'roneneldan/TinyStories',
        'f54c09fd23315a6f9c86f9dc80f725de7d8f9c64',
        'TinyStoriesV2-GPT4-train.txt', 'TinyStoriesV2-GPT4-valid.txt', 0, {
            'TinyStoriesV2-GPT4-train.txt':
                '6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443',
            'TinyStoriesV2-GPT4-valid.txt':
                '6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d'})}


# ---- fetching ------------------------------------------------------------------------------------

@dataclass
class Remote:
    """A file as the hub describes it."""
    size: int      # bytes
    sha256: str


@dataclass
class Fetched:
    """A file in the hub's cache, verified."""
    path: str
    sha256: str
    revision: str   # the commit that it belongs to


def fetch(corpus, revision, files, rooms=()):
    """Return {file: Fetched} for files of a corpus, which are fetched where the cache lacks them.

    rooms: further Rooms that the disks must have before the first byte is fetched. Where the cache
    has all files, the hub is not asked.

    Raises OSError with the reason."""
    paths = {file: ask(cached, corpus, revision, file) for file in files}
    absent = [file for file, path in paths.items() if path is None]
    listed = {}
    if absent:
        listed = ask(listing, corpus, revision)
        for file in absent:
            if file not in listed:
                raise OSError(f'{corpus.repo} has no file {file} at revision {revision}')
    missing = 0   # bytes to fetch
    for file in absent:
        missing += listed[file].size - size_of(blob_of(corpus, listed[file]) + PART)
    here = Room(cache_folder(), max(0, missing), 'HF_HOME=FOLDER before the command')
    check_rooms([here, *rooms])
    for file in absent:
        paths[file] = ask(download, corpus, revision, file, listed[file])
    fetched = {}
    for file, path in paths.items():
        expected = corpus.sha256.get(file)
        if not expected and file in listed:
            expected = listed[file].sha256
        digest = verify(corpus, path, expected or named_sha256(path))
        fetched[file] = Fetched(path, digest, os.path.basename(os.path.dirname(path)))
    return fetched


def cache_folder():
    """Return the folder of huggingface_hub's cache."""
    from huggingface_hub import constants  # imported here: only a download needs the package
    return constants.HF_HUB_CACHE


def cached(corpus, revision, file):
    """Return the path of a file in the hub's cache, or None."""
    from huggingface_hub import try_to_load_from_cache
    path = try_to_load_from_cache(corpus.repo, file, revision=revision, repo_type='dataset',
                                  cache_dir=cache_folder())
    return path if isinstance(path, str) else None


def listing(corpus, revision):
    """Return {file: Remote} of a corpus, as the hub lists it."""
    from huggingface_hub import HfApi
    info = HfApi().dataset_info(corpus.repo, revision=revision, files_metadata=True, timeout=30)
    files = {}
    for sibling in info.siblings:
        if sibling.lfs is not None:   # all large files are stored with Git LFS
            files[sibling.rfilename] = Remote(sibling.lfs.size, sibling.lfs.sha256)
    return files


def download(corpus, revision, file, remote):
    """Return the path of a file in the hub's cache, fetched from where an earlier call ended.

    The cache keeps a file under its SHA-256. hf_hub_download finds the file there and adds the
    links by which others find it. By itself, hf_hub_download would begin the download anew."""
    from huggingface_hub import hf_hub_download, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers
    blob = blob_of(corpus, remote)
    part = blob + PART
    os.makedirs(os.path.dirname(blob), exist_ok=True)
    with WeakFileLock(part + '.lock'):   # another process waits, and finds the whole file
        if not os.path.exists(blob):
            if size_of(part) > remote.size:   # a server once sent more than the file
                os.remove(part)
            url = hf_hub_url(corpus.repo, file, repo_type='dataset', revision=revision)
            with open(part, 'ab') as f:
                http_get(url, f, resume_size=f.tell(), headers=build_hf_headers(),
                         expected_size=remote.size, displayed_filename=file)
            os.replace(part, blob)
    with contextlib.suppress(OSError):   # another process removed it
        os.remove(part + '.lock')
    return hf_hub_download(corpus.repo, file, repo_type='dataset', revision=revision,
                           cache_dir=cache_folder())


def blob_of(corpus, remote):
    """Return the path at which the hub's cache keeps the bytes of a file."""
    from huggingface_hub.file_download import repo_folder_name
    folder = repo_folder_name(repo_id=corpus.repo, repo_type='dataset')
    return os.path.join(cache_folder(), folder, 'blobs', remote.sha256)


def size_of(path):
    """Return the bytes in a file, 0 where there is none."""
    return os.path.getsize(path) if os.path.exists(path) else 0


def ask(question, *args):
    """Return question(*args). Raises OSError with the reason where the hub fails to answer."""
    try:
        return question(*args)
    except ImportError as error:
        raise OSError(f'the package {error.name} is missing: '
                      f'pip install -r requirements.txt') from error
    except Exception as error:   # an answer can be anything, and each kind raises something else
        reason = ' '.join(str(error).split())[:300]
        raise OSError(f'{type(error).__name__}: {reason}') from error


def verify(corpus, path, expected):
    """Return the SHA-256 of a file in the hub's cache.

    Raises OSError where another is expected, and removes the file. expected: None if unknown."""
    digest = sha256_of(path)
    if expected and digest != expected:
        os.remove(os.path.realpath(path))
        if os.path.lexists(path):   # a link to what was removed
            os.remove(path)
        raise OSError(f'{os.path.basename(path)} of {corpus.repo} is another file than expected: '
                      f'SHA-256 {digest[:12]}…, not {expected[:12]}…')
    return digest


def sha256_of(path):
    """Return the SHA-256 of a file."""
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


def named_sha256(path):
    """Return the SHA-256 that the hub gave for a file in its cache, None where there are no links.

    The cache names a file by it, and the path is a link to that name."""
    return os.path.basename(os.readlink(path)) if os.path.islink(path) else None


# ---- room ----------------------------------------------------------------------------------------

@dataclass
class Room:
    """Bytes that a folder needs on its disk."""
    folder: str
    bytes: int
    elsewhere: str   # what to type for another place


def check_rooms(rooms):
    """Fail where a disk has less room than its folders need together."""
    needed = {}   # disk: bytes
    for room in rooms:
        there = existing(room.folder)
        disk = os.stat(there).st_dev
        needed[disk] = needed.get(disk, 0) + room.bytes
        free = shutil.disk_usage(there).free
        if room.bytes and needed[disk] > free:
            fail(f'{room.folder}: {needed[disk] / MB:,.0f} MB are needed, and its disk has '
                 f'{free / MB:,.0f} MB free; make room, or type {room.elsewhere} for another '
                 f'place')


def existing(folder):
    """Return the folder or, where it is not there yet, the nearest one above it that is."""
    folder = os.path.abspath(folder)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return folder
