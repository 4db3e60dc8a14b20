"""FID and KID against pytorch-fid, SciPy and sums written out; the weights' loaders against PyTorch."""

import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from helpers import random_weights

from bsvae_jax._io import downloads
from bsvae_jax._io.files import sha256_of
from bsvae_jax.distributed.mesh import data_mesh
from bsvae_jax.errors import UserError
from bsvae_jax.evaluation.fid import distance as fid
from bsvae_jax.evaluation.fid import features, inception
from bsvae_jax.evaluation.fid import statistics as feature_files
from bsvae_jax.evaluation.fid.features import FeatureNetwork
from bsvae_jax.evaluation.fid.inception import Inception, Weights, from_state_dict, load_weights
from bsvae_jax.models._state_dict import read_state_dict


def test_the_network_has_the_published_size():
    """94 convolutions; 21,785,568 parameters, as torchvision counts for Inception-v3 without its classifier."""
    expected = inception._expected()
    assert sum(len(shape) == 4 for _, shape in expected.values()) == 94
    trained = {name: shape for name, (_, shape) in expected.items() if "running" not in name}
    assert sum(np.prod(shape) for shape in trained.values()) == 21_785_568


# --- Against pytorch-fid ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference():
    """pytorch-fid's own network with `random_weights` in place of its download."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("pytorch_fid")
    # torchvision's compiled operators need a PyTorch of the same build; the network uses none of them.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    module = importlib.import_module("pytorch_fid.inception")
    arrays = {name: torch.tensor(array) for name, array in random_weights().items()}
    arrays |= {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: arrays)
        network = module.InceptionV3().eval()
    return torch, network


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("shape", [(3, 28, 28, 1), (2, 64, 64, 3), (2, 299, 299, 3)])
def test_features_are_those_of_pytorch_fid(reference, shape):
    torch, network = reference
    images = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    network_here = Weights(from_state_dict(random_weights()), "random").network()
    found = np.concatenate(list(network_here.features([images], data_mesh(), len(images))))
    given = torch.from_numpy(np.repeat(images, 3 // shape[-1], axis=-1).transpose(0, 3, 1, 2).copy()).float() / 255
    with torch.no_grad():
        expected = network(given)[0][:, :, 0, 0].numpy()
    assert found.shape == expected.shape == (shape[0], 2048)
    assert np.std(expected) > 0.01, "features of a dead network agree with anything"
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def statistics(kind):
    generator = np.random.default_rng(7)
    if kind == "random":
        x, y = generator.normal(size=(2, 300, 32)) @ generator.normal(size=(32, 32))
    elif kind == "rank-deficient":
        x, y = generator.normal(size=(2, 20, 64))
    elif kind == "one rank-deficient":
        x, y = generator.normal(size=(20, 64)), generator.normal(size=(500, 64))
    else:
        x = generator.normal(size=(500, 32))
        y = x + 1e-3 * generator.normal(size=(500, 32))
    return [part for data in (x, y) for part in (data.mean(axis=0), np.cov(data, rowvar=False))]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["random", "rank-deficient", "one rank-deficient", "nearly equal"])
def test_frechet_distance_is_that_of_pytorch_fid(reference, kind):
    score = importlib.import_module("pytorch_fid.fid_score")
    given = statistics(kind)
    # Relative to what is added up: the distance itself may be what is left of a cancellation.
    scale = np.trace(given[1]) + np.trace(given[3])
    expected = score.calculate_frechet_distance(*given)
    assert fid.frechet_distance(*given) == pytest.approx(expected, rel=1e-6, abs=1e-6 * scale)


# --- Distances, by themselves -----------------------------------------------------------------------------------------


def test_frechet_distance_of_diagonal_gaussians():
    """|m1 - m2|^2 + sum (s1 - s2)^2, by hand: 9 + (1-2)^2 + (3-0)^2 = 19."""
    assert fid.frechet_distance(np.zeros(2), np.diag([1.0, 9.0]), np.array([0.0, 3.0]), np.diag([4.0, 0.0])) == pytest.approx(
        19.0
    )


@pytest.mark.parametrize("kind", ["random", "nearly equal"])
def test_frechet_distance_by_the_matrix_square_root(kind):
    mean1, covariance1, mean2, covariance2 = statistics(kind)
    root = scipy.linalg.sqrtm(covariance1 @ covariance2).real
    expected = np.sum((mean1 - mean2) ** 2) + np.trace(covariance1 + covariance2 - 2 * root)
    scale = np.trace(covariance1) + np.trace(covariance2)
    assert fid.frechet_distance(mean1, covariance1, mean2, covariance2) == pytest.approx(expected, abs=1e-9 * scale)


def test_frechet_distance_of_a_set_and_itself_is_zero_also_without_full_rank():
    mean, covariance, *_ = statistics("rank-deficient")
    assert abs(fid.frechet_distance(mean, covariance, mean, covariance)) < 1e-12 * np.trace(covariance)


def test_moments_in_parts_are_those_of_the_whole():
    x = np.random.default_rng(3).normal(1e4, 1.0, (101, 5))  # a far mean: sums of squares would cancel
    moments = fid.no_moments(5)
    for part in np.split(x, [1, 2, 40]):
        moments = fid.add(moments, part)
    np.testing.assert_allclose(moments.mean, x.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(x, rowvar=False), rtol=1e-10, atol=1e-10)


def test_squared_mmd_is_the_sum_written_out():
    generator = np.random.default_rng(5)
    x, y = generator.normal(size=(6, 3)), generator.normal(0.5, 1, size=(5, 3))

    def kernel(a, b):
        return (sum(a[i] * b[i] for i in range(3)) / 3 + 1) ** 3

    within_x = sum(kernel(x[i], x[j]) for i in range(6) for j in range(6) if i != j) / 30
    within_y = sum(kernel(y[i], y[j]) for i in range(5) for j in range(5) if i != j) / 20
    between = sum(kernel(a, b) for a in x for b in y) / 30
    assert fid.squared_mmd(x, y) == pytest.approx(within_x + within_y - 2 * between, rel=1e-12)


@pytest.mark.long
def test_kernel_distance_is_unbiased_and_its_standard_error_is_honest():
    """300 pairs of sets from one distribution: the mean is 0 within 4 standard errors, and the errors stated are the spread
    found, within 25% (the spread of 300 numbers has a relative error of 4%, the mean of squared errors from 10 blocks 3%)."""
    generator = np.random.default_rng(0)
    found = [fid.kernel_distance(*generator.normal(size=(2, 60, 4)), seed=i) for i in range(300)]
    values = np.array([distance.value for distance in found])
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(300)
    stated = np.sqrt(np.mean([distance.standard_error**2 for distance in found]))
    assert stated == pytest.approx(values.std(), rel=0.25)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(bad):
    with pytest.raises(UserError, match="not finite"):
        fid.add(fid.no_moments(2), np.array([[0.0, bad]]))
    with pytest.raises(UserError, match="finite"):
        fid.frechet_distance(np.array([bad]), np.eye(1), np.zeros(1), np.eye(1))


def test_too_few_samples_for_a_kernel_distance_are_refused():
    with pytest.raises(UserError, match="at least four"):
        fid.kernel_distance(np.zeros((3, 2)), np.zeros((9, 2)))
    with pytest.raises(UserError, match="at least two"):
        fid.squared_mmd(np.zeros((1, 2)), np.zeros((9, 2)))


# --- Images in, features out ------------------------------------------------------------------------------------------


def test_batches_of_any_size_come_out_in_order(monkeypatch):
    """The stream's bookkeeping, with the mean intensity in place of the network."""
    monkeypatch.setattr(features, "_parallelized", lambda compute, mesh: compute)
    network = FeatureNetwork("mean", "", 1, "", "", lambda _, images: images.mean(axis=(1, 2, 3))[:, None], {})
    images = np.arange(11, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    parts = np.split(images, [1, 1, 8])
    found = np.concatenate(list(network.features(parts, data_mesh(1), batch_size=4)))
    assert found[:, 0].tolist() == list(range(11))


def test_features_of_images_that_lie_by_class_are_kept_of_all_classes(monkeypatch, tmp_path):
    """Two classes, one after the other, of which 60 of 300 images are kept; interrupted, and a file of an earlier version."""
    monkeypatch.setattr(features, "_parallelized", lambda compute, mesh: compute)
    monkeypatch.setattr(feature_files, "KEPT", 60)
    monkeypatch.setattr(feature_files, "GROUP", 10)
    network = FeatureNetwork("mean", "", 1, "", "", lambda _, images: images.mean(axis=(1, 2, 3))[:, None], {})
    values = np.random.default_rng(0).permutation(100).repeat(3)
    values = np.where(np.arange(300) < 150, values // 2, 128 + values // 2)
    images = values.astype(np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)

    def from_there_on(first, end=300):
        return (images[start : start + 10] for start in range(first, end, 10))

    def taken(source=from_there_on):
        return feature_files.feature_statistics(
            network, source, 300, data_mesh(1), tmp_path / "mean.npz", lambda _: None, lambda _: None
        )

    whole = taken()
    assert whole.features.shape == (60, 1)
    first_class = (whole.features < 100).mean()
    assert 0.3 < first_class < 0.7, "half of them, give or take three standard deviations of 0.06"
    assert set(whole.features[:, 0]) <= set(values)
    np.testing.assert_allclose(whole.moments.mean, values.mean())
    np.savez(tmp_path / "mean.npz", **whole.moments._asdict(), features=whole.features)  # as an earlier version wrote it
    began = []
    taken(lambda first: began.append(first) or from_there_on(first, 130))
    assert began == [0]
    again = taken(lambda first: began.append(first) or from_there_on(first))
    assert began == [0, 130]
    np.testing.assert_array_equal(again.features, whole.features)
    np.testing.assert_allclose(again.moments.covariance, np.var(values, ddof=1)[None, None])


def test_resizing_is_half_pixel_bilinear_without_antialiasing():
    """A row of 2 to 299: linear between the centers 1/4 and 3/4, constant beyond; pixel j has its center at (j + 1/2)/299."""
    row = np.array([[[[0], [255]]]], np.uint8)
    found = np.asarray(inception.resize(jnp.asarray(row)))[0, 0, :, 0]
    expected = 2 * np.clip(((np.arange(299) + 0.5) / 299 - 0.25) * 2, 0, 1) - 1
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    "images", [np.zeros((2, 8, 8, 1), np.float32), np.zeros((2, 8, 8, 2), np.uint8), np.zeros((2, 8, 8), np.uint8)]
)
def test_images_of_another_kind_are_refused(images):
    with pytest.raises(UserError, match="8-bit images"):
        list(Weights({}, "none").network().features([images], data_mesh(1), 2))


# --- Weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_weights_load_from_npz(tmp_path):
    arrays = random_weights()
    np.savez(tmp_path / "weights.npz", **arrays, **{"fc.weight": np.zeros((1008, 2048), np.float32)})
    weights = load_weights(tmp_path / "weights.npz")
    assert not weights.published
    kernel = weights.variables["params"]["Mixed_7c"]["branch3x3_2a"]["conv"]["kernel"]
    np.testing.assert_array_equal(kernel, arrays["Mixed_7c.branch3x3_2a.conv.weight"].transpose(2, 3, 1, 0))
    jax.tree.map(
        lambda one, other: None,
        weights.variables,
        jax.eval_shape(Inception().init, jax.random.key(0), np.zeros((1, 299, 299, 3))),
    )


@pytest.mark.parametrize("legacy", [False, True])
def test_weights_load_from_pth_as_pytorch_writes_it(tmp_path, legacy):
    torch = pytest.importorskip("torch")
    arrays = random_weights()
    path = tmp_path / "weights.pth"
    torch.save({name: torch.tensor(array) for name, array in arrays.items()}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match="SHA-256"):
        load_weights(path)
    weights = load_weights(path, sha256=None)
    expected = from_state_dict(arrays)
    jax.tree.map(np.testing.assert_array_equal, weights.variables, expected)


def test_weights_are_hashed_once(tmp_path, monkeypatch, served):
    """They are 90 MB, and a hash takes a fifth of a second or a second each."""
    torch = pytest.importorskip("torch")
    folder, url = served
    torch.save({name: torch.tensor(array) for name, array in random_weights().items()}, folder / "weights.pth")
    hashed, size = [], (folder / "weights.pth").stat().st_size
    wanted = sha256_of(folder / "weights.pth")
    monkeypatch.setattr(inception, "WEIGHTS", inception.Download(f"{url}weights.pth", size, wanted))
    load_weights()  # downloads them
    for module in (inception, downloads):
        monkeypatch.setattr(module, "sha256_of", lambda path: hashed.append(path) or sha256_of(path))
    assert load_weights().source == load_weights(folder / "weights.pth", wanted).source == wanted
    assert [path.parent.name for path in hashed] == ["cache", "served"]


@pytest.mark.long
def test_weights_of_another_network_are_refused():
    arrays = random_weights()
    name = "Conv2d_1a_3x3.conv.weight"
    with pytest.raises(UserError, match=r"misses Conv2d_1a_3x3\.conv\.weight and 0 more"):
        from_state_dict({key: array for key, array in arrays.items() if key != name})
    with pytest.raises(UserError, match=r"has layer1\.weight, which the network has not"):
        from_state_dict(arrays | {"layer1.weight": np.zeros(3)})
    with pytest.raises(UserError, match="has shape"):
        from_state_dict(arrays | {name: np.zeros((32, 3, 5, 5))})
    with pytest.raises(UserError, match="not finite"):
        from_state_dict(arrays | {name: arrays[name] * np.nan})


def test_weights_that_cannot_be_downloaded_are_asked_for(tmp_path, monkeypatch, served):
    monkeypatch.setattr(inception, "WEIGHTS", inception.WEIGHTS._replace(url=served[1] + "absent.pth"))
    with pytest.raises(UserError, match=r"could not be downloaded.*--inception-weights FILE"):
        load_weights()
    with pytest.raises(UserError, match=r"no file.*SHA-256 6726825d"):
        load_weights(tmp_path / "elsewhere.npz")


def test_a_download_of_other_content_is_refused(monkeypatch, served, own_cache):
    folder, url = served
    (folder / "weights.pth").write_bytes(b"something else")
    monkeypatch.setattr(inception, "WEIGHTS", inception.WEIGHTS._replace(url=url + "weights.pth"))
    with pytest.raises(UserError, match="has another SHA-256 than 6726825d"):
        load_weights()
    assert not list(own_cache.iterdir()), "nothing of it is kept"


# --- The reader of .pth files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
def test_every_dtype_and_view_is_read(tmp_path, legacy):
    torch = pytest.importorskip("torch")
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "transposed": base.T,
        "part": base[1:3, ::2],
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        **{str(kind): torch.tensor([1, 0, 3]).to(kind) for kind in (torch.float64, torch.float16, torch.int64, torch.int32)},
        **{str(kind): torch.tensor([1, 0, 3]).to(kind) for kind in (torch.int16, torch.int8, torch.uint8, torch.bool)},
    }
    path = tmp_path / "tensors.pth"
    torch.save(tensors, path, _use_new_zipfile_serialization=not legacy)
    found = read_state_dict(path)
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        expected = tensor.detach().numpy()
        assert found[name].dtype == expected.dtype, name
        np.testing.assert_array_equal(found[name], expected, err_msg=name)


def test_bfloat16_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"x": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}, tmp_path / "x.pth")
    assert read_state_dict(tmp_path / "x.pth")["x"].astype(np.float32).tolist() == [1.5, -2.0]


def test_a_module_with_buffers_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    torch.save(module.state_dict(), tmp_path / "module.pth")
    found = read_state_dict(tmp_path / "module.pth")
    for name, tensor in module.state_dict().items():
        np.testing.assert_array_equal(found[name], tensor.numpy())


class Evil:
    def __reduce__(self):
        return (sys.exit, ("a program in a pickle has run",))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("content", ["program", "number", "list", "nested", "string"])
def test_a_file_that_holds_more_than_tensors_is_refused(tmp_path, legacy, content):
    torch = pytest.importorskip("torch")
    values = {
        "program": {"x": torch.ones(1), "y": Evil()},
        "number": {"epoch": 3},
        "list": [torch.ones(1)],
        "nested": {"optimizer": {"x": torch.ones(1)}},
        "string": {"x": "text"},
    }
    path = tmp_path / "evil.pth"
    torch.save(values[content], path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match="refused"):
        read_state_dict(path)


def test_a_plain_pickle_that_runs_a_program_is_refused_without_running_it(tmp_path):
    """Written by hand, no PyTorch needed: `os.system("touch RAN")` in protocol 0 and 2."""
    for number, program in enumerate(
        (b"cos\nsystem\n(S'touch RAN'\ntR.", b"\x80\x02cos\nsystem\nX\x09\x00\x00\x00touch RAN\x85R.")
    ):
        path = tmp_path / f"evil{number}.pth"
        path.write_bytes(program)
        with pytest.raises(UserError, match="evil"):
            read_state_dict(path)
    assert not (tmp_path / "RAN").exists()


def test_damaged_files_are_refused_or_read_unchanged(tmp_path):
    """400 seeded mutations of each layout, byte flips and cuts: a sentence, or the same names with arrays of the same shapes
    (a flipped bit in a number cannot be seen without a hash, which the published file has)."""
    torch = pytest.importorskip("torch")
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4)}
    generator = np.random.default_rng(0)
    refused = 0
    for legacy in (False, True):
        path = tmp_path / "file.pth"
        torch.save(tensors, path, _use_new_zipfile_serialization=not legacy)
        original = path.read_bytes()
        for _ in range(400):
            content = bytearray(original)
            if generator.random() < 0.25:
                content = content[: generator.integers(len(content))]
            else:
                for position in generator.integers(len(content), size=generator.integers(1, 4)):
                    content[position] = generator.integers(256)
            path.write_bytes(content)
            try:
                found = read_state_dict(path)
            except UserError:
                refused += 1
            else:
                assert all(isinstance(array, np.ndarray) and array.size <= 10_000 for array in found.values())
    assert refused > 400


def test_a_tensor_that_reaches_beyond_its_numbers_is_refused(tmp_path):
    """A view of 2**40 repetitions of one number would fill the memory; one past the end would show what lies there."""
    torch = pytest.importorskip("torch")
    torch.save({"x": torch.ones(1).expand(2**40)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="reaches beyond"):
        read_state_dict(tmp_path / "x.pth")
