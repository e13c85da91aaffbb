"""What players of known memory score, and the statistics: units, tests, the gap at which half is left, the verdict."""

import math

import numpy as np
import pytest

from eval.recall import analysis
from eval.recall.analysis import curves, half_at
from eval.recall.items import build
from eval.recall.play import CUE, ROWS, by_row, play
from eval.recall.results import BEYOND, EXCERPTS, HEARD, REACH, WHO, WINDOW, Setting
from eval.results.schema import CheckpointInfo
from eval.streaming.weighting import WEIGHTINGS
from tests.helpers import recall_players as players

EXCERPT, GAPS = 25, (50, 150, 250)
INFO = CheckpointInfo("player", contexts=(8, 8), ttt_layers=(0,))
FILES = [players.speech(700, seed) for seed in range(4)]


def setting(kinds=(HEARD,), gaps=GAPS, arms=("persist", "reset")):
    return Setting(list(kinds), EXCERPT, 8, list(gaps), CUE, 0, "equal", dict.fromkeys(arms, ""))


def items(files=FILES, kinds=(HEARD,), gaps=GAPS, count=8, seed=0):
    return build(files, kinds, EXCERPT, gaps, count, seed)[0]


def curve(player, of=None, info=INFO, kind=HEARD, **changes):
    played = list(play(items() if of is None else of, player, CUE, 2))
    return curves(played, info, "persist", setting(**{"kinds": (kind,), **changes}), "files")[kind]


def means(of):
    return [point.arms["persist"].benefit.mean for point in of.gaps]


def test_a_perfect_buffer_scores_the_maximum():
    of = curve(players.perfect_buffer)
    assert means(of) == [players.UNKNOWN] * 3
    for point in of.gaps:
        assert (point.arms["persist"].unheard.mean, point.arms["persist"].heard.mean) == (players.UNKNOWN, 0)
        assert all(benefit.mean == players.UNKNOWN for benefit in point.arms["persist"].by_row.values())
    assert of.half.seconds is None  # more than half is left at the longest gap


def test_a_memoryless_player_scores_nothing_at_all():
    of = curve(players.memoryless)
    assert means(of) == [0, 0, 0]
    assert of.half is None
    assert of.gaps[0].arms["persist"].unheard.mean > 0.5


def test_intervals_of_dice_cover_nothing_as_often_as_they_say():
    few = items(gaps=(50,))
    covered = 0
    for seed in range(200):
        benefit = curve(players.dice(seed), few).gaps[0].arms["persist"].benefit
        covered += benefit.low <= 0 <= benefit.high
    assert 180 <= covered <= 199  # 190 of 200 are expected


def test_swapping_the_playings_changes_the_sign():
    straight = items()
    swapped = [item._replace(firsts=item.firsts[::-1]) for item in straight]
    for player in (players.perfect_buffer, players.forgetting(100)):
        assert means(curve(player, swapped)) == [-mean for mean in means(curve(player, straight))]


def test_exponential_forgetting_has_its_half_life():
    of = curve(players.forgetting(100))
    expected = [players.UNKNOWN * 0.5 ** ((gap + EXCERPT) / 100) for gap in GAPS]
    assert means(of) == pytest.approx(expected)
    assert of.half.first == 50
    # Half of what is left after 50 frames is left 100 frames later; every unit says so.
    assert (of.half.seconds, of.half.low, of.half.high) == pytest.approx((12, 12, 12))


def test_who_is_it_is_recalled_by_the_voice():
    files = [players.voice(400, seed, seed) for seed in range(4)]
    of = curve(players.knows_voices, items(files, (WHO,), (50,)), kind=WHO)
    assert means(of) == [players.UNKNOWN - 1]
    pair = curve(players.knows_voices, items(files[:2], (WHO,), (50,)), kind=WHO)
    assert means(pair) == [players.UNKNOWN - 1]
    assert means(curve(players.memoryless, items(files, (WHO,), (50,)), kind=WHO)) == [0]


def test_units_are_speakers_and_excerpts_of_one_speaker_only():
    point = curve(players.dice(0)).gaps[0]
    assert (point.items, point.units, point.unit, point.arms["persist"].benefit.n) == (8, 4, "files", 4)
    point = curve(players.dice(0), items(FILES[:1])).gaps[0]
    assert (point.items, point.units, point.unit, point.arms["persist"].benefit.n) == (8, 8, EXCERPTS, 8)


def test_one_item_is_too_little_for_a_test():
    of = curve(players.perfect_buffer, items(count=1))
    assert means(of) == [players.UNKNOWN] * 3
    assert math.isnan(of.gaps[0].arms["persist"].benefit.low)
    assert of.half is None
    assert "one excerpt is too little for a test" in of.verdict


def test_gaps_are_named_by_what_attention_sees():
    info = CheckpointInfo("player", contexts=(60, 100), ttt_layers=(0,))
    assert [point.where for point in curve(players.memoryless, info=info).gaps] == [WINDOW, REACH, BEYOND]


def test_a_prediction_that_is_not_finite_leaves_its_item_out():
    def player(streams):
        return [None, *players.perfect_buffer(streams)[1:]]

    played = list(play(items(gaps=(50,)), player, CUE, 2))
    assert [one.losses is None for one in played] == [True, False] * 4
    point = curves(played, INFO, "persist", setting(), "files")[HEARD].gaps[0]
    assert (point.items, point.failed) == (4, 4)
    assert point.arms["persist"].benefit.mean == players.UNKNOWN


def test_batches_are_filled_up_and_the_rest_is_not_scored():
    of = items(gaps=(50,), count=5)
    widths = []

    def player(streams):
        widths.append(len(streams))
        return players.perfect_buffer(streams)

    assert [one.item.number for one in play(of, player, CUE, 2)] == list(range(5))
    assert widths == [8, 8, 8]


def test_first_frames_of_the_second_playing_are_no_part_of_the_score():
    (item,) = items(gaps=(50,), count=1)

    def player(streams):
        nats = np.zeros((9, item.start + EXCERPT))
        nats[:, item.start + CUE] = 21.0
        nats[:, item.start + CUE - 1] = 1e6
        return [{"persist": nats}] * len(streams)

    (one,) = play([item], player, CUE, 1)
    assert (one.losses["persist"] == 1).all()  # 21 in one of 21 frames


def test_weightings_are_over_the_codebooks_that_are_known():
    nats = np.arange(9.0)[:, None].repeat(3, 1)
    nats[0] = np.nan
    assert dict(zip(ROWS, by_row(nats), strict=True)) == pytest.approx(
        {"text": math.nan, "equal": 4.5, "kyutai": (100 + 35) / 107, "semantic": 1, "acoustic": 5}, nan_ok=True
    )
    nats[2:] = np.nan  # as in tasks, where one codebook is answered
    nats[1, 0] = np.nan
    assert dict(zip(ROWS, by_row(nats), strict=True)) == pytest.approx(
        {"text": math.nan, "equal": 1, "kyutai": 1, "semantic": 1, "acoustic": math.nan}, nan_ok=True
    )
    assert len(ROWS) == len(WEIGHTINGS) + 1


@pytest.mark.parametrize(
    ("benefit", "half"),
    [
        ([4, 3, 1], math.sqrt(20 * 40)),  # 2 lies in the middle of 3 and 1
        ([4, 2, 1], 20),
        ([4, 3, 2.1], math.inf),
        ([4, math.nan, 0], math.sqrt(10 * 40)),
        ([4, -4, 3], 10 * 2**0.25),
        ([-1, 2, 3], 10),
    ],
)
def test_half_is_found_in_the_logarithm_of_the_gap(benefit, half):
    assert half_at(np.array([10.0, 20.0, 40.0]), np.array(benefit)) == pytest.approx(half)


def several(losses, arms, gaps=GAPS):
    """A curve of players under several arms: `losses` by arm, a factor on what is unknown after a repetition."""

    def player(streams):
        known = players.perfect_buffer(streams)
        rng = np.random.default_rng(len(streams[0].T))
        noise = [0.01 * rng.random() for _ in streams]
        return [
            {arm: players.UNKNOWN - losses[arm] * (players.UNKNOWN - nats["persist"]) + more for arm in arms}
            for nats, more in zip(known, noise, strict=True)
        ]

    played = list(play(items(gaps=gaps), player, CUE, 2))
    return curves(played, INFO, "persist", setting(gaps=gaps, arms=arms), "files")[HEARD]


def test_other_speakers_at_a_longer_gap_are_no_forgetting():
    nan = np.nan
    kept = np.array([[1.0, 1.0, nan], [0.1, 0.1, 0.1]])  # neither speaker forgets, and one recalls little
    assert analysis.left(kept) == pytest.approx([0.55] * 3)
    assert analysis.left(np.array([[1.0, 0.5, nan], [0.2, 0.1, 0.05]])) == pytest.approx([0.6, 0.3, 0.15])
    np.testing.assert_array_equal(analysis.left(np.array([[1.0, 0.5, nan], [-0.1, nan, 0.2]])), [0.45, 0.225, nan])
    np.testing.assert_array_equal(analysis.left(np.array([[-1.0, 0.5]])), [-1, nan])


def test_persist_is_tested_against_reset_and_frozen_with_holm_over_gaps():
    arms = ("persist", "reset", "frozen", "off")
    of = several({"persist": 0.5, "reset": 0.0, "frozen": 0.2, "off": 0.0}, arms)
    for point in of.gaps:
        assert set(point.against) == {"reset", "frozen"}
        assert point.against["reset"].test.mean == pytest.approx(1.5)
        assert point.against["frozen"].test.mean == pytest.approx(0.9)
    raw = [point.against["reset"].test.p for point in of.gaps]
    assert [point.against["reset"].p_holm for point in of.gaps] == pytest.approx(analysis.holm(raw), abs=0)
    assert min(raw) < min(point.against["reset"].p_holm for point in of.gaps)
    assert of.verdict.startswith("player recalls beyond attention's reach (1.2 s) at 4 s, 12 s, 20 s: persist against")
    assert "p < 0.001" in of.verdict


@pytest.mark.parametrize(
    ("persist", "info", "words"),
    [
        (0.0, INFO, "recalls nothing that can be told from chance"),
        (-0.5, INFO, "makes it harder at 4 s, 12 s, 20 s"),
        (0.5, CheckpointInfo("player", (200, 200), (0,)), "no gap lies beyond attention's reach"),
        (0.5, CheckpointInfo("player", (8,), (0,), attention_sink=1), "by its attention sink"),
    ],
)
def test_the_verdict_says_what_can_be_said(persist, info, words, monkeypatch):
    monkeypatch.setattr(f"{__name__}.INFO", info)
    of = several({"persist": persist, "reset": 0.0}, ("persist", "reset"))
    assert words in of.verdict


def test_checkpoints_are_compared_item_by_item():
    of = items(gaps=(50, 150))
    rng = np.random.default_rng(0)
    how_well = {item.streams()[0].tobytes(): rng.random() for item in of}

    def player(more):
        def scores(streams):
            # Items differ much in how well they are recalled, by both checkpoints.
            share = 0.5 * how_well[streams[0].tobytes()] + more
            known = players.perfect_buffer(streams)
            return [{"persist": players.UNKNOWN + share * (nats["persist"] - players.UNKNOWN)} for nats in known]

        return scores

    first, other = (list(play(of, player(more), CUE, 1)) for more in (0, 0.1))
    other[0] = other[0]._replace(losses=None)
    by_kind = analysis.between((first, "persist"), (other, "persist"), setting(gaps=(50, 150)))
    assert list(by_kind) == [HEARD]
    for one, gap in zip(by_kind[HEARD], (50, 150), strict=True):
        assert (one.gap, one.test.n) == (gap, 4)
        assert one.test.mean == pytest.approx(0.1 * players.UNKNOWN)
        assert one.p_holm < 0.001
    adjusted = analysis.holm([one.test.p for one in by_kind[HEARD]])
    assert [one.p_holm for one in by_kind[HEARD]] == pytest.approx(adjusted, abs=0)


def test_a_model_without_ttt_layers_is_not_tested():
    def player(streams):
        return [{"off": scores["persist"]} for scores in players.memoryless(streams)]

    info = CheckpointInfo("plain", contexts=(8, 8), ttt_layers=())
    played = list(play(items(), player, CUE, 2))
    of = curves(played, info, "off", setting(arms=("persist", "reset", "frozen", "off")), "files")[HEARD]
    assert list(of.gaps[0].arms) == ["off"]
    assert of.gaps[0].against == {}
    assert "has no TTT layers" in of.verdict
