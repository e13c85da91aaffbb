"""Checkpoints: which are kept, and which count as damaged."""

import logging
import random
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.comparing import same
from tests.helpers.converting import nightly
from ttt_jax.checkpoints import checksums, run_checkpoints
from ttt_jax.checkpoints.run_checkpoints import Checkpoints
from ttt_jax.errors import InputError

# Orbax leaves reads that it has not waited for behind when another fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def content(step=1):
    """Weights and state that differ from step to step in every leaf; not all floats are numbers."""
    rng = np.random.default_rng(step)
    params = {
        "layers": {"a": jnp.asarray(rng.normal(size=(5, 8)), jnp.float32)},
        "gate": jnp.full(3, step, jnp.bfloat16),
    }
    state = {
        "moments": (params, None, {"count": jnp.asarray(step, jnp.int32)}),
        "key": jax.random.key_data(jax.random.key(step)),
        "live": jnp.asarray(rng.integers(0, 2, 9), bool),
        "odd": jnp.asarray([np.nan, -0.0, np.inf], jnp.float16),
    }
    return params, state


def like(_):
    return content()


def save(checkpoints, *steps, validation=None):
    for step in steps:
        checkpoints.save(step, *content(step), {"file": step, "rows": [1, 2]}, {"config": {"n": step}}, validation)


def check_is(saved, step):
    assert saved.step == step
    same((saved.params, saved.state), content(step))
    assert (saved.data, saved.meta) == ({"file": step, "rows": [1, 2]}, {"config": {"n": step}})


def named_steps(run):
    return {path.name for path in (run / "checkpoints").iterdir()}


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints 1, 2, 3."""
    checkpoints = Checkpoints(tmp_path / "run", keep=3)
    save(checkpoints, 1, 2, 3)
    checkpoints.close()
    return tmp_path / "run"


def files_of(run, step=3):
    return sorted(path for path in (run / "checkpoints" / str(step)).rglob("*") if path.is_file())


def test_what_was_saved_comes_back_bit_for_bit(run):
    check_is(Checkpoints(run).restore(like), 3)
    assert Checkpoints(run).meta() == {"config": {"n": 3}}
    weights_alone = Checkpoints(run).restore(lambda meta: (content()[0], None))
    assert weights_alone.state is None
    same(weights_alone.params, content(3)[0])


@pytest.mark.parametrize(
    ("losses", "kept", "best"),
    [
        ([1.0, 1.0, 2.0, 3.0], {"1", "3", "4"}, 1),
        ([float("nan"), 5.0, None, float("-inf")], {"2", "3", "4"}, 2),
        ([float("-inf"), None, None, None], {"3", "4"}, None),
        ([2.0, 3.0, None, 1.0], {"3", "4"}, 4),
    ],
)
def test_the_latest_are_kept_and_the_best(tmp_path, losses, kept, best):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, loss in enumerate(losses, 1):
        save(checkpoints, step, validation=loss)
    checkpoints.close()
    assert named_steps(tmp_path) == kept
    assert Checkpoints(tmp_path).best() == best


def test_the_best_is_still_known_and_kept_when_the_run_is_opened_anew(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1, validation=1.0)
    checkpoints.close()
    again = Checkpoints(tmp_path, keep=1)
    save(again, 2, 3, validation=2.0)
    again.close()
    assert named_steps(tmp_path) == {"1", "3"}
    assert Checkpoints(tmp_path).best() == 1


def test_a_step_is_saved_once(run):
    checkpoints = Checkpoints(run, keep=3)
    with pytest.raises(ValueError, match="3 already exists"):
        save(checkpoints, 3)


@pytest.mark.parametrize("dtype", nightly("bfloat16", "float32", "float16", "int32", "uint32", "uint8", "bool"))
def test_another_bit_in_any_place_gives_another_sum(dtype):
    raw = np.random.default_rng(0).integers(0, 256, 24 * jnp.dtype(dtype).itemsize, np.uint8)
    raw = raw % 2 if dtype == "bool" else raw
    flips = [(place, bit) for place in range(raw.size) for bit in range(1 if dtype == "bool" else 8)]
    changed = np.tile(raw, (len(flips) + 1, 1))
    for row, (place, bit) in enumerate(flips):
        changed[row, place] ^= 1 << bit
    arrays = changed.view(jnp.dtype(dtype)).reshape(-1, 4, 6)
    found = np.asarray(jax.jit(jax.vmap(checksums.sum_of))(arrays))
    assert (found[:-1] != found[-1]).all()
    assert checksums.sums({"x": jnp.asarray(arrays[-1])})["x"] == found[-1]


def test_mixing_can_be_undone_so_no_two_values_are_mixed_to_one():
    x = np.random.default_rng(0).integers(0, 2**32, 100_000, np.uint32)
    y = np.array(checksums._mix(jnp.asarray(x)))
    y ^= y >> 16
    y *= np.uint32(pow(0xC2B2AE35, -1, 2**32))
    y ^= (y >> 13) ^ (y >> 26)
    y *= np.uint32(pow(0x85EBCA6B, -1, 2**32))
    y ^= y >> 16
    np.testing.assert_array_equal(y, x)


def test_moved_values_give_another_sum():
    x = np.arange(64, dtype=np.float32).reshape(8, 8)
    total = checksums.sums({"x": jnp.asarray(x)})["x"]
    for other in (x[::-1], x.T, np.roll(x, 1, 0), np.roll(x, 1, 1)):
        assert checksums.sums({"x": jnp.asarray(other)})["x"] != total


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]


DAMAGE = {
    "a flipped bit": lambda data: flipped(data, len(data) // 2),
    "a flipped first bit": lambda data: flipped(data, 0),
    "a flipped last bit": lambda data: flipped(data, len(data) - 1),
    "another flipped bit": lambda data: flipped(data, random.Random(0).randrange(len(data))),
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "gone": None,
}


@pytest.mark.parametrize("kind", nightly("a flipped bit", "cut", *DAMAGE, default=2))
def test_damage_in_any_file_is_found_or_harms_nothing(run, caplog, kind):
    found = set()
    for path in files_of(run):
        whole = path.read_bytes()
        path.unlink()
        if kind != "gone":
            path.write_bytes(DAMAGE[kind](whole))
        caplog.clear()
        saved = Checkpoints(run).restore(like)
        check_is(saved, saved.step)
        assert saved.step == (2 if "checkpoints/3 is damaged" in caplog.text else 3)
        if saved.step == 2:
            found.add(path.relative_to(run / "checkpoints" / "3").parts[0])
        path.write_bytes(whole)
    assert found == {"params", "state", "data", "meta", "integrity"}
    check_is(Checkpoints(run).restore(like), 3)


def test_a_part_of_another_checkpoint_is_found(run, caplog):
    """Its files have no fault: only the checksums tell."""
    whole = run / "checkpoints" / "3"
    for part in ("params", "state", "data", "meta", "integrity"):
        shutil.move(whole / part, run / part)
        shutil.copytree(run / "checkpoints" / "1" / part, whole / part)
        caplog.clear()
        check_is(Checkpoints(run).restore(like), 2)
        assert "checkpoints/3 is damaged (" in caplog.text
        assert (part in ("params", "state")) == (f"other bits than were saved in {part}" in caplog.text)
        shutil.rmtree(whole / part)
        check_is(Checkpoints(run).restore(like), 2)  # gone
        shutil.move(run / part, whole / part)


def test_a_damaged_checkpoint_is_named_and_moved_aside_and_its_step_saved_anew(run, caplog):
    (run / "checkpoints" / "3" / "data" / "metadata").write_text('{"file": 3, "rows": [1, 3]}')
    for attempt in ("3", "3.1"):
        checkpoints = Checkpoints(run, keep=3)
        with caplog.at_level(logging.WARNING, "train"):
            check_is(checkpoints.restore(like), 2)
        assert f"{run}/checkpoints/3 is damaged (data does not match its CRC-32)" in caplog.text
        assert (run / "damaged" / attempt / "data" / "metadata").is_file()
        assert checkpoints.steps() == [1, 2]
        save(checkpoints, 3)
        checkpoints.close()
        check_is(Checkpoints(run).restore(like), 3)
        (run / "checkpoints" / "3" / "data" / "metadata").write_text("{")
        caplog.clear()
        if attempt == "3":
            (run / "checkpoints" / "3" / "data" / "metadata").write_text('{"file": 3, "rows": [1, 3]}')
    assert named_steps(run) == {"1", "2", "3"}


def test_readers_go_back_but_move_nothing(run, caplog):
    (run / "checkpoints" / "3" / "meta" / "metadata").write_text("{")
    assert run_checkpoints.open_run(run).meta() == {"config": {"n": 2}}
    check_is(run_checkpoints.open_run(run).restore(like), 2)
    assert f"{run}/checkpoints/3 is damaged (meta/metadata is not JSON)" in caplog.text
    assert named_steps(run) == {"1", "2", "3"}
    assert not (run / "damaged").exists()


def test_a_damaged_loss_is_no_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 1, validation=2.0)
    save(checkpoints, 2, validation=1.0)
    checkpoints.close()
    path = tmp_path / "checkpoints" / "2" / "integrity" / "metadata"
    path.write_text(path.read_text().replace('"validation": 1.0', '"validation": 0.5'))
    assert Checkpoints(tmp_path).best() == 1


def test_if_all_are_damaged_one_sentence_lists_them_and_nothing_is_moved(run):
    for step in (1, 2, 3):
        (run / "checkpoints" / str(step) / "data" / "metadata").unlink()
    for keep in (None, 3):
        with pytest.raises(
            InputError, match=r"holds no checkpoint that is not damaged \(3: data/metadata is missing; 2: "
        ) as info:
            Checkpoints(run, keep=keep).restore(like)
        assert "\n" not in str(info.value)
    assert named_steps(run) == {"1", "2", "3"}


def test_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no checkpoint: the run ended before its first"):
        Checkpoints(tmp_path, keep=1).restore(like)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda params: {**params, "gate": jnp.zeros(4, jnp.bfloat16)}, r"params/gate of shape \[3\] instead of \[4\]"),
        (lambda params: {**params, "gate": jnp.zeros(3)}, "params/gate as bfloat16 instead of float32"),
        (lambda params: {**params, "new": jnp.zeros(3)}, "lacks params/new"),
        (lambda params: {"gate": params["gate"]}, "has params/layers/a, which the model does not have"),
    ],
)
def test_another_architecture_is_not_called_damaged(run, caplog, change, problem):
    params, state = content()
    with pytest.raises(InputError, match=f"checkpoints/3 is of another version or architecture .*{problem}"):
        Checkpoints(run, keep=3).restore(lambda meta: (change(params), state))
    assert "damaged" not in caplog.text
    assert named_steps(run) == {"1", "2", "3"}


def test_streams_with_the_sum_of_the_open_mini_batch_are_refused(run):
    params, state = content()
    older, newer = ({**state, "layers": {"ttt": {name: (jnp.zeros(3),)}}} for name in ("open_sum", "open_steps"))
    checkpoints = Checkpoints(run, keep=4)
    checkpoints.save(4, params, older, {}, {})
    checkpoints.close()
    with pytest.raises(
        InputError, match=r"checkpoints/4 is of an older version, .*\(open_sum\).*\(open_steps\): go on"
    ):
        Checkpoints(run).restore(lambda meta: (params, newer))


def test_errors_of_the_caller_are_not_damage(run):
    def wrong(meta):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Checkpoints(run, keep=3).restore(wrong)
    assert named_steps(run) == {"1", "2", "3"}


@pytest.mark.parametrize("by", nightly("close", "save"))
def test_a_save_that_fails_in_the_background_is_reported(run, by):
    checkpoints = Checkpoints(run, keep=1)
    save(checkpoints, 4)
    checkpoints._manager.wait_until_finished()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))  # no file may grow further, as on a full disk
    try:
        save(checkpoints, 5)
        end = {"save": lambda: save(checkpoints, 6), "close": checkpoints.close}[by]
        # Of its threads Orbax reports the first that fails: rarely one whose folder another has just removed.
        reason = "(File too large|No such file or directory)"
        with pytest.raises(InputError, match=f"could not be written to .*{reason}.*--resume") as info:
            end()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(info.value)
    check_is(Checkpoints(run).restore(like), 4)
    again = Checkpoints(run, keep=1)
    save(again, 5)
    again.close()
    assert named_steps(run) == {"5"}


def test_what_a_killed_save_or_removal_left_is_removed(run):
    (run / "checkpoints" / "3").rename(run / "checkpoints" / "3.orbax-checkpoint-tmp")
    shutil.copytree(run / "checkpoints" / "1", run / "checkpoints" / run_checkpoints._PRUNED / "1")
    assert Checkpoints(run).steps() == [1, 2]
    checkpoints = Checkpoints(run, keep=3)
    save(checkpoints, 3)
    assert run_checkpoints._PRUNED not in named_steps(run)
    checkpoints.close()
    assert named_steps(run) == {"1", "2", "3"}
