"""The data: found, checked, fetched; and every way in which a file can be wrong."""

import gzip
import hashlib
import io
import pathlib
import struct
import urllib.error
import urllib.request

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adabatch_jax.training.data import _datasets, load_dataset, to_float

FILES = (*_datasets._TRAIN, *_datasets._TEST)
IMAGES, LABELS = _datasets._TRAIN


def idx(array):
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def small_files(offset):
    """Four IDX files, 12 training and 5 test images of 3x4; the offset tells the sets apart."""
    contents = {}
    for names, count in ((_datasets._TRAIN, 12), (_datasets._TEST, 5)):
        contents[names[0]] = idx(np.arange(count * 12).reshape(count, 3, 4) + offset)
        contents[names[1]] = idx((np.arange(count) + offset) % 10)
    return contents


REAL_MD5, REAL_SYSTEM_DIR = _datasets._MD5, _datasets._SYSTEM_DIR
CONTENTS = {"mnist": small_files(0), "fashion-mnist": small_files(1)}


def checksums(contents):
    return tuple(hashlib.md5(contents[name]).hexdigest() for name in FILES)


@pytest.fixture(autouse=True)
def small_world(tmp_path, monkeypatch):
    """Small files in place of the real ones, no data anywhere, and no network."""
    monkeypatch.setattr(_datasets, "_MD5", {name: checksums(CONTENTS[name]) for name in CONTENTS})
    monkeypatch.setattr(_datasets, "_SYSTEM_DIR", tmp_path / "system")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("ADABATCH_DATA_DIR", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def offline(url, timeout):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", offline)


def put(folder, contents, packed=False, dotted=False):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        name = name.replace("-idx", ".idx") if dotted else name
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return folder


def assert_is(dataset, name):
    offset = {"mnist": 0, "fashion-mnist": 1}[name]
    assert dataset.name == name
    assert dataset.num_classes == 10
    expected = np.arange(12 * 12).reshape(12, 3, 4) + offset
    np.testing.assert_array_equal(dataset.train_inputs, expected)
    np.testing.assert_array_equal(dataset.test_inputs, expected[:5])
    np.testing.assert_array_equal(dataset.train_labels, (np.arange(12) + offset) % 10)
    np.testing.assert_array_equal(dataset.test_labels, (np.arange(5) + offset) % 10)
    assert dataset.train_inputs.dtype == dataset.test_inputs.dtype == np.uint8
    assert dataset.train_labels.dtype == dataset.test_labels.dtype == np.int32


def refusal(*arguments, error=ValueError):
    """The message of the error, which must be a single line."""
    with pytest.raises(error) as caught:
        load_dataset(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Finding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("dotted", [False, True], ids=["-idx", ".idx"])
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_reads_a_folder(tmp_path, name, packed, dotted):
    folder = put(tmp_path / "data", CONTENTS[name], packed, dotted)
    assert_is(load_dataset(name, folder), name)
    assert_is(load_dataset(name, str(folder)), name)


def test_unpacked_bytes_under_a_packed_name(tmp_path):
    put(tmp_path, {f"{name}.gz": content for name, content in CONTENTS["mnist"].items()})
    assert_is(load_dataset("mnist", tmp_path), "mnist")


@pytest.mark.parametrize(
    "place",
    [
        "environment",
        "environment/mnist",
        "system/mnist",
        "home/.cache/adabatch-jax/mnist",
        "here/data/mnist",
    ],
)
def test_searches_the_usual_places(tmp_path, monkeypatch, place):
    monkeypatch.setenv("ADABATCH_DATA_DIR", str(tmp_path / "environment"))
    put(tmp_path / place, CONTENTS["mnist"])
    assert_is(load_dataset("mnist"), "mnist")


def test_the_first_place_wins(tmp_path, monkeypatch):
    monkeypatch.setenv("ADABATCH_DATA_DIR", str(tmp_path / "environment"))
    places = [
        pathlib.Path("data/mnist"),
        tmp_path / "home/.cache/adabatch-jax/mnist",
        tmp_path / "system/mnist",
        tmp_path / "environment",
    ]
    for place in places:
        # A damaged file is an error, not a reason to look elsewhere: so it shows who was asked.
        put(place, {IMAGES: b"damaged"})
        assert refusal("mnist").startswith(f"{place / IMAGES}: ")


def test_both_sets_may_share_a_folder(tmp_path):
    put(tmp_path, CONTENTS["mnist"])
    put(tmp_path / "fashion-mnist", CONTENTS["fashion-mnist"])
    assert_is(load_dataset("mnist", tmp_path), "mnist")
    assert_is(load_dataset("fashion-mnist", tmp_path), "fashion-mnist")


def test_data_dir_is_the_only_place(tmp_path):
    put(tmp_path / "system" / "mnist", CONTENTS["mnist"])
    assert_is(load_dataset("mnist"), "mnist")
    message = refusal("mnist", tmp_path / "elsewhere", error=FileNotFoundError)
    assert IMAGES in message
    assert str(tmp_path / "elsewhere") in message


def test_unknown_name():
    message = refusal("cifar")
    assert "'cifar'" in message
    assert "'digits', 'mnist', 'fashion-mnist'" in message


# Damage ---------------------------------------------------------------------------------------

GOOD = CONTENTS["mnist"][IMAGES]
PACKED = gzip.compress(GOOD)
DAMAGE = {
    "empty": (b"", "truncated, 0 bytes end inside the IDX header"),
    "cut in the header": (GOOD[:9], "truncated, 9 bytes end inside the IDX header"),
    "cut in the data": (GOOD[:-1], "truncated, 143 bytes where the header says 144"),
    "too long": (GOOD + b"x", "too long, 145 bytes where the header says 144"),
    "another type": (b"\0\0\x0d" + GOOD[3:], "wrong magic number 00000d03, expected 00000803"),
    "labels": (CONTENTS["mnist"][LABELS], "wrong magic number 00000801, expected 00000803"),
    "a web page": (b"<!doctype html>", "wrong magic number 3c21646f, expected 00000803"),
    "one bit": (GOOD[:-1] + b"\0", "md5 mismatch"),
    "gz cut": (PACKED[:-20], "truncated gzip file"),
    "gz cut in its header": (PACKED[:5], "truncated gzip file"),
    "gz damaged": (PACKED[:20] + b"\xff" * 8 + PACKED[28:], "corrupt gzip file"),
    "gz stream": (PACKED[:10] + b"\x07" + PACKED[11:], "corrupt gzip file"),
    "gz checksum": (PACKED[:-8] + b"\0" * 4 + PACKED[-4:], "corrupt gzip file"),
    "gz of a cut file": (gzip.compress(GOOD[:-1]), "truncated, 143 bytes"),
    "the other set": (CONTENTS["fashion-mnist"][IMAGES], f"this is {IMAGES} of fashion-mnist"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_named(tmp_path, damage):
    content, complaint = DAMAGE[damage]
    name = f"{IMAGES}.gz" if damage.startswith("gz") else IMAGES
    put(tmp_path, CONTENTS["mnist"])
    (tmp_path / IMAGES).unlink()
    (tmp_path / name).write_bytes(content)
    message = refusal("mnist", tmp_path)
    assert str(tmp_path / name) in message
    assert complaint in message


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_checked(tmp_path, name):
    put(tmp_path, CONTENTS["mnist"])
    damaged = bytearray(CONTENTS["mnist"][name])
    damaged[-1] ^= 1
    (tmp_path / name).write_bytes(damaged)
    message = refusal("mnist", tmp_path)
    assert str(tmp_path / name) in message
    assert "md5" in message


@pytest.mark.parametrize(
    ("labels", "complaint"),
    [
        (np.full(12, 10), "label 10 out of range, expected 0 to 9"),
        (np.zeros(11), "12 images, .* has 11 labels"),
    ],
)
def test_labels_that_do_not_fit(tmp_path, monkeypatch, labels, complaint):
    contents = {**CONTENTS["mnist"], LABELS: idx(labels)}
    monkeypatch.setattr(_datasets, "_MD5", {"mnist": checksums(contents)})
    put(tmp_path, contents)
    with pytest.raises(ValueError, match=complaint):
        load_dataset("mnist", tmp_path)


# Fetching -------------------------------------------------------------------------------------


class Mirrors:
    """Answers requests from a table of address → bytes or error, and keeps a record."""

    def __init__(self, answers):
        self.answers = answers
        self.asked = []

    def __call__(self, url, timeout):
        assert timeout > 0
        self.asked.append(url)
        answer = self.answers(url)
        if isinstance(answer, Exception):
            raise answer
        return io.BytesIO(answer)


def good_answer(url):
    return gzip.compress(CONTENTS["mnist"][url.rpartition("/")[2].removesuffix(".gz")])


def files_below(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_offline_says_where_and_what_and_how(tmp_path, monkeypatch):
    monkeypatch.setenv("ADABATCH_DATA_DIR", str(tmp_path / "environment"))
    message = refusal("fashion-mnist", error=FileNotFoundError)
    for place in ("environment", "system/fashion-mnist", "home/.cache/adabatch-jax/fashion-mnist"):
        assert str(tmp_path / place) in message
    for mirror in _datasets._MIRRORS["fashion-mnist"]:
        assert mirror in message
    assert "no route to host" in message
    assert "--data-dir" in message
    assert "dataset-fashion-mnist" in message
    assert "dataset-fashion-mnist" not in refusal("mnist", error=FileNotFoundError)
    assert files_below(tmp_path) == []


def test_fetches_once(tmp_path, monkeypatch):
    mirrors = Mirrors(good_answer)
    monkeypatch.setattr(urllib.request, "urlopen", mirrors)
    assert_is(load_dataset("mnist"), "mnist")
    first = _datasets._MIRRORS["mnist"][0]
    assert mirrors.asked == [f"{first}{name}.gz" for name in FILES]
    cache = tmp_path / "home/.cache/adabatch-jax/mnist"
    assert files_below(tmp_path) == files_below(cache) == sorted(f"{name}.gz" for name in FILES)
    assert_is(load_dataset("mnist"), "mnist")
    assert len(mirrors.asked) == 4


def test_fetches_only_what_is_missing(tmp_path, monkeypatch):
    mirrors = Mirrors(good_answer)
    monkeypatch.setattr(urllib.request, "urlopen", mirrors)
    put(tmp_path / "system" / "mnist", {**CONTENTS["mnist"], LABELS: b""})
    (tmp_path / "system" / "mnist" / LABELS).unlink()
    assert_is(load_dataset("mnist"), "mnist")
    assert [url.rpartition("/")[2] for url in mirrors.asked] == [f"{LABELS}.gz"]


@pytest.mark.parametrize(
    "bad",
    [
        urllib.error.HTTPError("url", 404, "Not Found", None, None),
        TimeoutError("timed out"),
        b"<!doctype html>",
        gzip.compress(GOOD)[:-30],
        gzip.compress(CONTENTS["fashion-mnist"][IMAGES]),
    ],
    ids=["404", "timeout", "web page", "truncated", "wrong file"],
)
def test_a_bad_mirror_is_passed_over(tmp_path, monkeypatch, bad):
    first, second = _datasets._MIRRORS["mnist"]

    def answer(url):
        return bad if url.startswith(first) else good_answer(url)

    mirrors = Mirrors(answer)
    monkeypatch.setattr(urllib.request, "urlopen", mirrors)
    assert_is(load_dataset("mnist"), "mnist")
    assert mirrors.asked[:2] == [f"{first}{IMAGES}.gz", f"{second}{IMAGES}.gz"]
    for path in (tmp_path / "home").rglob("*.gz"):
        assert gzip.decompress(path.read_bytes()) == CONTENTS["mnist"][path.stem]


def test_nothing_bad_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", Mirrors(lambda url: PACKED[:-20]))
    message = refusal("mnist", error=FileNotFoundError)
    assert message.count("truncated gzip file") == len(_datasets._MIRRORS["mnist"])
    assert files_below(tmp_path) == []


def test_nothing_half_written_is_kept(tmp_path, monkeypatch):
    def full_disk(path, content):
        with open(path, "wb") as file:
            file.write(content[:10])
        raise OSError("No space left on device")

    monkeypatch.setattr(urllib.request, "urlopen", Mirrors(good_answer))
    monkeypatch.setattr("pathlib.Path.write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        load_dataset("mnist")
    assert files_below(tmp_path) == []


# Real data ------------------------------------------------------------------------------------


def test_the_table_of_checksums_is_complete():
    assert REAL_MD5.keys() == _datasets._MIRRORS.keys() == CONTENTS.keys()
    digests = [digest for row in REAL_MD5.values() for digest in row]
    assert len(set(digests)) == 8
    assert all(len(bytes.fromhex(digest)) == 16 for digest in digests)


@pytest.mark.skipif(
    not (REAL_SYSTEM_DIR / "fashion-mnist").is_dir(), reason="Debian's dataset is not installed"
)
def test_the_real_fashion_mnist(monkeypatch):
    monkeypatch.setattr(_datasets, "_MD5", REAL_MD5)
    monkeypatch.setattr(_datasets, "_SYSTEM_DIR", REAL_SYSTEM_DIR)
    dataset = load_dataset("fashion-mnist")
    assert dataset.train_inputs.shape == (60_000, 28, 28)
    assert dataset.test_inputs.shape == (10_000, 28, 28)
    assert np.bincount(dataset.train_labels).tolist() == [6_000] * 10


# Digits and scaling ---------------------------------------------------------------------------


def test_digits():
    digits = load_dataset("digits")
    assert digits.train_inputs.shape == (1437, 8, 8)
    assert digits.test_inputs.shape == (360, 8, 8)
    assert digits.train_inputs.dtype == digits.test_inputs.dtype == np.float32
    assert digits.train_labels.dtype == digits.test_labels.dtype == np.int32
    assert digits.train_inputs.min() == 0
    assert digits.train_inputs.max() == 1
    for labels in (digits.train_labels, digits.test_labels):
        assert sorted(set(labels.tolist())) == list(range(10))
    # The split is shuffled, complete, and the same every time.
    import sklearn.datasets

    original = sklearn.datasets.load_digits()
    both = np.concatenate([digits.train_inputs, digits.test_inputs]).reshape(1797, 64)
    labels = np.concatenate([digits.train_labels, digits.test_labels])
    ours = np.column_stack([both * 16, labels])
    theirs = np.column_stack([original.data, original.target])
    np.testing.assert_array_equal(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)])
    assert not np.array_equal(labels, original.target)
    np.testing.assert_array_equal(load_dataset("digits").train_inputs, digits.train_inputs)
    assert digits.train_labels[:10].tolist() == [2, 4, 5, 4, 8, 2, 0, 6, 3, 3]


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_to_float(wrap):
    raw = np.arange(256, dtype=np.uint8).reshape(4, 8, 8)
    scaled = wrap(to_float)(jnp.asarray(raw))
    assert scaled.dtype == jnp.float32
    np.testing.assert_allclose(scaled, raw / 255.0, rtol=2e-7)
    for dtype in (jnp.float32, jnp.bfloat16):
        floats = jnp.linspace(0, 1, 5, dtype=dtype)
        same = wrap(to_float)(floats)
        assert same.dtype == dtype
        np.testing.assert_array_equal(same, floats)


def test_to_float_refuses_other_integers():
    with pytest.raises(ValueError, match="uint8 or floats, got int32"):
        to_float(jnp.arange(3))
