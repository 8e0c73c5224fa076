"""vitxr factorize of several models: interrupted, it saves what there is and says how to go on."""

import signal

import numpy as np
import pytest
import xarray as xr
from synthetic import extraction, stimuli
from test_resume import count_fits

import vitxr
from vitxr.cli import factorize, main
from vitxr.cli.show import amount
from vitxr.factor import methods

#: Of the patch grid.
PLACES = 64
RUN = ["--layer", "0", "--rank", "2,3", "--replicates", "2", "--feature-maps", "4", "--quiet"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    ds = extraction(stimuli(per_class=2), step=8, layers=(0,), channels=6)
    vitxr.save(ds, tmp_path / "run.nc")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def signal_after(patch, number, ended):
    """Send a signal to this process when so many fits have ended."""
    real, seen = methods.hals.fit_models, []

    def fit_models(*args, **given):
        def stop(model, iteration, objective, last):
            seen.extend([model] * last)
            if len(seen) >= ended:
                signal.raise_signal(number)

        return real(*args, **{**given, "callback": stop})

    patch.setattr(methods.hals, "fit_models", fit_models)


@pytest.mark.parametrize(
    ("number", "status", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_interrupted_and_resumed(folder, number, status, word, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        signal_after(patch, number, 2)
        with pytest.warns(RuntimeWarning, match="2 of 4 fits have no model"):
            assert main(["factorize", "run.nc", "half.nc", *RUN]) == status
    told = capsys.readouterr()
    assert "Written to half.nc" in told.out
    assert f"vitxr factorize: {word}: 2 of 4 fits are left. The same command with" in told.err
    assert "--resume half.nc goes on" in told.err
    fitted = count_fits(monkeypatch)
    assert main(["factorize", "run.nc", "all.nc", *RUN, "--resume", "half.nc"]) == 0
    assert len(fitted) == 2
    assert "2 of 4 fits are those of half.nc, 2 are new" in capsys.readouterr().out
    assert main(["factorize", "run.nc", "at-once.nc", *RUN]) == 0
    assert "fits are those of" not in capsys.readouterr().out
    one, other = vitxr.open("all.nc"), vitxr.open("at-once.nc")
    np.testing.assert_allclose(one.objective, other.objective, rtol=1e-5)
    assert not one.failed.any()


def test_a_file_without_a_fit_of_use_says_so(folder, capsys):
    few = ["--layer", "0", "--feature-maps", "4", "--quiet", "--replicates", "2", "--rank"]
    assert main(["factorize", "run.nc", "other.nc", *few, "5"]) == 0
    said = (
        r"none of the fits .* all 4 are made anew: it has ranks 5 with 2 replicates, of which 2 "
        r"have a model and \d converged within 500 iterations; wanted: ranks 2, 3 with 2 replicates"
    )
    with pytest.warns(RuntimeWarning, match=said):
        assert main(["factorize", "run.nc", "all.nc", *few, "2,3", "--resume", "other.nc"]) == 0
    assert "0 of 4 fits are those of other.nc, 4 are new" in capsys.readouterr().out
    assert vitxr.open("all.nc").attrs["reused"] == 0


def test_a_signal_while_the_result_is_written_does_not_lose_it(folder, monkeypatch, capsys):
    real = vitxr.save

    def save(result, path):
        signal.raise_signal(signal.SIGINT)
        return real(result, path)

    monkeypatch.setattr(vitxr, "save", save)
    assert main(["factorize", "run.nc", "e.nc", *RUN]) == 0
    assert not vitxr.open("e.nc").failed.any()


def test_as_many_feature_maps_as_there_are_up_to_twenty(folder, capsys):
    fit = ["--layer", "0", "--rank", "2", "--quiet"]
    assert main(["factorize", "run.nc", "few.nc", *fit]) == 0
    assert "All 6 feature maps, which is what the store keeps" in capsys.readouterr().out
    assert vitxr.open("few.nc").sizes["neuron"] == 6 * PLACES
    many = extraction(stimuli(per_class=1), step=16, layers=(0,), channels=23)
    vitxr.save(many, folder / "many.nc")
    assert main(["factorize", "many.nc", "some.nc", *fit, "--matrix"]) == 0
    assert "20 of 23 feature maps" in capsys.readouterr().out
    assert vitxr.open("some.nc").sizes["neuron"] == 20 * PLACES
    assert main(["factorize", "many.nc", "given.nc", *fit, "--feature-maps", "all"]) == 0
    assert "feature maps" not in capsys.readouterr().out
    assert vitxr.open("given.nc").sizes["neuron"] == 23 * PLACES


def test_a_tensor_that_would_fill_the_memory_is_not_loaded(folder, monkeypatch, capsys):
    real, seen = methods.prepare, []

    def prepare(t, *rest):
        seen.append(t)
        return real(t, *rest)

    monkeypatch.setattr(methods, "prepare", prepare)
    fit = ["factorize", "run.nc", "--layer", "0", "--rank", "2", "--feature-maps", "4", "--quiet"]
    size = vitxr.open("run.nc").vit.neuron_tensor(layer=0, feature_maps=4).nbytes
    for room, loaded in ((2 * size, True), (2 * size - 1, False), (None, False)):
        monkeypatch.setattr(factorize, "_available", lambda room=room: room)
        assert main([*fit[:2], f"{loaded}{room}.nc", *fit[2:]]) == 0
        assert (seen.pop().chunks is None) == loaded
        assert ("it is not loaded" in capsys.readouterr().out) != loaded
    names = [f"True{2 * size}.nc", f"False{2 * size - 1}.nc"]
    one, other = (vitxr.open(name).drop_vars("seconds").load() for name in names)
    xr.testing.assert_allclose(one, other)


def test_the_memory_that_is_available():
    known = factorize._available()
    assert known is None or 1e6 < known < 1e15


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (602_112, "602 kB"), (63_700_000_000, "63.7 GB")],
)
def test_sizes_are_in_powers_of_a_thousand(count, said):
    assert amount(count) == said


def test_floors_and_what_is_refused(folder, capsys):
    assert main(["factorize", "run.nc", "e.nc", *RUN, "--floors"]) == 0
    assert np.isfinite(vitxr.open("e.nc").shuffled_objective).all()
    capsys.readouterr()
    single = ["factorize", "run.nc", "f.nc", "--layer", "0", "--rank", "2"]
    for option in (["--floors"], ["--resume", "e.nc"]):
        assert main([*single, *option]) == 1
        assert f"{option[0]} is for ensembles: give several ranks" in capsys.readouterr().err
    assert main(["factorize", "run.nc", "g.nc", *RUN, "--resume", "e.nc", "--seed", "1"]) == 1
    assert "random_state 0, not 1" in capsys.readouterr().err
    assert main(["factorize", "run.nc", "g.nc", *RUN, "--resume", "none.nc"]) == 1
    assert "none.nc" in capsys.readouterr().err
    assert not (folder / "g.nc").exists()
