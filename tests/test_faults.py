"""What goes wrong around a fit, or inside it, ends in the last good model or in a clear error."""

import errno
import io
import os
import pickle
import signal
import sys
import warnings
import zlib
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.process_executor import TerminatedWorkerError
from sklearn.model_selection import GridSearchCV
from torch import nn

from sk_ebm import DensityClassifier, EBMFlowDensity, TrainingWarning
from sk_ebm._version import STATE_FORMAT


def quick(**parameters):
    defaults = {"base": "gaussian", "max_iter": 6, "n_estimators": 2, "n_chains": 64, "hidden_layer_sizes": (16, 16)}
    return EBMFlowDensity(**{**defaults, "random_state": 0, **parameters})


@pytest.fixture(scope="module")
def X():
    rng = np.random.default_rng(0)
    return rng.normal(size=(60, 2)) + np.where(rng.random((60, 1)) < 0.7, 0.0, 4.0)


@pytest.fixture(scope="module")
def fitted(X):
    return quick().fit(X)


def assert_usable(model, X):
    assert np.isfinite(model.score_samples(X)).all()
    assert np.isfinite(model.sample(20, random_state=0)).all()
    assert np.isfinite(model.log_normalizer_)


class Energy(nn.Module):
    """A small network, for subclasses to break."""

    def __init__(self, n_features):
        super().__init__()
        self.layer = nn.Linear(n_features, 1)

    def forward(self, z):
        return self.layer(z).squeeze(-1)


class NanGradient(torch.autograd.Function):
    """The identity, with a gradient of NaN."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


class NanGradientEnergy(Energy):
    """Finite, but its gradient is NaN after some steps."""

    def forward(self, z):
        energy = super().forward(z)
        self.n_calls = getattr(self, "n_calls", 0) + energy.requires_grad
        return NanGradient.apply(energy) if self.n_calls > 30 else energy


class PartlyNan(Energy):
    """NaN far from the middle, where some proposals go."""

    def forward(self, z):
        return super().forward(z).masked_fill(z.norm(dim=-1) > 2.5, float("nan"))


class PartlyInfinite(Energy):
    """Infinite far from the middle: no mass there."""

    def forward(self, z):
        return super().forward(z).masked_fill(z.norm(dim=-1) > 2.5, float("inf"))


class PartlyMinusInfinite(Energy):
    """Minus infinity far from the middle, which no density has."""

    def forward(self, z):
        return super().forward(z).masked_fill(z.norm(dim=-1) > 2.5, float("-inf"))


class DeadlyEnergy(Energy):
    """Kills its process, if that is a worker."""

    def __init__(self, n_features):
        super().__init__(n_features)
        if os.getpid() != int(os.environ["SK_EBM_TEST_PARENT"]):
            os.kill(os.getpid(), signal.SIGKILL)


class OutOfMemory(Energy):
    """Asks for more memory than any machine has."""

    def forward(self, z):
        return super().forward(z) + torch.empty(2**50).sum()


@pytest.mark.filterwarnings("ignore::sk_ebm.TrainingWarning")
def test_gradients_that_are_no_numbers_change_nothing(X):
    assert_usable(quick(energy=NanGradientEnergy).fit(X), X)


@pytest.mark.filterwarnings("ignore::sk_ebm.TrainingWarning", "ignore::sk_ebm.LowEffectiveSampleSizeWarning")
@pytest.mark.parametrize("energy", [PartlyNan, PartlyInfinite, PartlyMinusInfinite])
def test_an_energy_that_is_no_number_somewhere_gives_a_density_or_an_error(X, energy):
    inside = X[np.linalg.norm((X - X.mean(0)) / X.std(0), axis=1) < 1.5]
    try:
        model = quick(energy=energy).fit(inside)
    except ValueError as error:
        assert "energy" in str(error)  # noqa: PT017
    else:
        assert_usable(model, inside)
        assert not np.isnan(model.score_samples(10 * X)).any()


@pytest.mark.filterwarnings("ignore::sk_ebm.TrainingWarning", "ignore::sk_ebm.LowEffectiveSampleSizeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("broken", ["log_prob", "sample_and_log_prob"])
def test_a_flow_that_overflows_costs_proposals_only(X, monkeypatch, broken, value):
    from sk_ebm._flow import CouplingFlow

    works = getattr(CouplingFlow, broken)

    def overflows(self, *arguments):
        result = works(self, *arguments)
        if torch.is_grad_enabled():
            return result
        drawn, log_prob = (None, result) if broken == "log_prob" else result
        log_prob = torch.where(torch.arange(len(log_prob)) % 5 == 0, value, log_prob)
        return log_prob if drawn is None else (drawn * log_prob.isfinite().unsqueeze(-1), log_prob)

    monkeypatch.setattr(CouplingFlow, broken, overflows)
    model = quick().fit(X)
    assert np.isfinite(model.score_samples(X)).all()


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_no_memory_says_which_knobs_to_turn(X, device):
    with pytest.raises(MemoryError, match="n_chains .now 64.*batch_size .now 256") as caught:
        quick(energy=OutOfMemory, device=device).fit(X)
    assert ("device='cpu'" in str(caught.value)) == (device != "cpu")


def test_no_memory_on_a_gpu_says_which_knobs_to_turn(X, fitted, monkeypatch):
    def full(*arguments):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    before = fitted.score_samples(X)
    monkeypatch.setattr("sk_ebm._training._TrainState.energy_steps", full)
    with pytest.raises(MemoryError, match="n_chains .*batch_size .*n_estimators .*device='cpu'"):
        fitted.fit(X)
    np.testing.assert_array_equal(fitted.score_samples(X), before)


def test_other_errors_of_torch_are_left_alone(X, monkeypatch):
    def fails(*arguments):
        raise RuntimeError("something else")

    monkeypatch.setattr("sk_ebm._training._TrainState.energy_steps", fails)
    with pytest.raises(RuntimeError, match="something else"):
        quick().fit(X)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
@pytest.mark.parametrize("part", np.linspace(0.02, 0.98, 13).round(2))
def test_an_interrupt_at_any_moment_leaves_a_usable_model(X, fitted, part):
    """The previous fit, or the best so far of the new one with a warning that says so."""
    model, before = pickle.loads(pickle.dumps(fitted)), fitted.score_samples(X)
    seconds = test_an_interrupt_at_any_moment_leaves_a_usable_model.__dict__.setdefault("seconds", [])
    if not seconds:
        started = os.times().elapsed
        quick().fit(X[:50])
        seconds.append(os.times().elapsed - started)

    def interrupt(signal_number, frame):
        # Only where a fit computes: Python drops an interrupt in a callback of its garbage collection or of a weak
        # reference, and one within the lock of the coverage tool would leave it locked for ever.
        computing = ("sk_ebm", "torch", "normflows", "numpy", "sklearn")
        if frame.f_globals.get("__name__", "").split(".")[0] not in computing:
            signal.setitimer(signal.ITIMER_REAL, 0.001)
        else:
            raise KeyboardInterrupt

    handler = signal.signal(signal.SIGALRM, interrupt)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            signal.setitimer(signal.ITIMER_REAL, part * seconds[0])
            try:
                model.fit(X[:50])
                is_new = True
            except KeyboardInterrupt:
                is_new = False
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert_usable(model, X)
    if not is_new:
        np.testing.assert_array_equal(model.score_samples(X), before)
    elif "interrupted" in model.outcome_:
        assert any(issubclass(warning.category, TrainingWarning) for warning in caught)


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_worker_is_an_error_and_no_hang(X, monkeypatch):
    # Workers of an earlier test would not see these.
    get_reusable_executor().shutdown()
    monkeypatch.setenv("SK_EBM_TEST_PARENT", str(os.getpid()))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    search = GridSearchCV(quick(energy=DeadlyEnergy), {"alpha": [0.01, 0.1]}, cv=2, n_jobs=2)
    with pytest.raises(TerminatedWorkerError):
        search.fit(X)
    assert not hasattr(search, "best_estimator_")
    assert_usable(quick().fit(X), X)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_an_error_and_spares_the_model(X, fitted):
    before = fitted.score_samples(X)
    with pytest.raises(OSError) as caught:
        joblib.dump(fitted, "/dev/full")
    assert caught.value.errno == errno.ENOSPC
    np.testing.assert_array_equal(fitted.score_samples(X), before)


@pytest.mark.parametrize("part", np.linspace(0, 0.999, 40).round(3))
@pytest.mark.parametrize("compress", [0, 3])
def test_a_truncated_file_does_not_load(fitted, tmp_path, part, compress):
    path = tmp_path / "density.joblib"
    joblib.dump(fitted, path, compress=compress)
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    # Which error it is depends on where the file ends.
    with pytest.raises(Exception):  # noqa: B017
        joblib.load(path)


def test_a_compressed_file_with_a_wrong_byte_does_not_load(fitted, X, tmp_path):
    """The checksum of the compression sees it; an uncompressed file has none."""
    path, rng = tmp_path / "density.joblib", np.random.default_rng(0)
    joblib.dump(fitted, path, compress=3)
    content = path.read_bytes()
    for position in rng.integers(2, len(content), 60):
        wrong = bytearray(content)
        wrong[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(wrong)
        try:
            joblib.load(path)
        except Exception:  # noqa: S112
            continue
        # Another way to write the same, as when what repeats is copied from elsewhere.
        assert zlib.decompress(wrong) == zlib.decompress(content)


def test_a_foreign_file_does_not_load(tmp_path):
    path = tmp_path / "density.joblib"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(1000))
    with pytest.raises(Exception):  # noqa: B017
        joblib.load(path)


@pytest.mark.parametrize("estimator", [quick(), DensityClassifier()])
@pytest.mark.parametrize("difference", [-1, 1])
def test_another_format_says_so_before_anything_is_loaded(estimator, monkeypatch, difference):
    monkeypatch.setattr("sk_ebm._persistence.STATE_FORMAT", STATE_FORMAT + difference)
    monkeypatch.setattr("sk_ebm._persistence.__version__", "7.8.9")
    estimator.part_of_another_version = Unloadable()
    content = pickle.dumps(estimator)
    del estimator.part_of_another_version
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"saved by sk_ebm 7\.8\.9.*cannot read.*fit it again"):
        pickle.loads(content)
    assert pickle.loads(pickle.dumps(estimator)).get_params().keys() == estimator.get_params().keys()


class Unloadable:
    def __reduce__(self):
        return int, ("no number",)


def test_a_model_of_another_device_loads_without_it(X, fitted):
    """All tensors are on the CPU, wherever the fit ran, so a file asks for no device."""
    content = io.BytesIO()
    pickle.dump(fitted, content)
    assert b"cuda" not in content.getvalue()
    for module in (fitted.density_, fitted.proposal_, fitted.feature_map_):
        assert {tensor.device.type for tensor in module.state_dict().values()} == {"cpu"}
