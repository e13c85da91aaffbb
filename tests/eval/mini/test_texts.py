"""Words, sentences and stories of the mini benchmarks: what makes a pair, and that nothing but that tells it apart."""

from collections import Counter

import pytest

from eval.mini import sentences, stories, words
from eval.mini.words import KIND, bare, bigrams, classes
from ttt_jax.errors import InputError

WORDS = words.read_words()
SEEDS = range(8)
every_draw = pytest.mark.parametrize("draw", [words.draw, sentences.draw, stories.draw])


@every_draw
def test_the_same_seed_gives_the_same_texts_and_another_seed_others(draw):
    assert draw(3, 20) == draw(3, 20) != draw(4, 20)


# Words


def test_the_list_has_each_word_once_in_every_band_and_phones_that_are_known():
    assert len(WORDS) >= 120
    assert len({word.text for word in WORDS}) == len({bare(word.phones) for word in WORDS}) == len(WORDS)
    bands = Counter(word.frequency for word in WORDS)
    assert set(bands) == {0, 3, 10, 50, 300}
    assert min(bands.values()) >= 15
    for word in WORDS:
        for phone, plain in zip(word.phones, bare(word.phones), strict=True):
            assert (KIND[plain] == "vowel") == (phone != plain), (word.text, phone)
        assert sum(phone.endswith("1") for phone in word.phones) == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_non_words_have_one_phone_exchanged_for_one_of_its_class(seed):
    real = words.read_avoided() | {bare(word.phones) for word in WORDS}
    pairs = words.draw(seed, len(WORDS))
    assert len({bare(pair.nonword) for pair in pairs} | real) == len(pairs) + len(real)  # new, and none twice
    assert {pair.word for pair in pairs} == set(WORDS)
    for word, nonword in pairs:
        exchanged = [(old, new) for old, new in zip(word.phones, nonword, strict=True) if old != new]
        (old, new), *others = exchanged
        assert not others
        assert KIND[bare((old,))[0]] == KIND[bare((new,))[0]]
        assert old[len(bare((old,))[0]) :] == new[len(bare((new,))[0]) :]  # the stress stays


@pytest.mark.parametrize("seed", SEEDS)
def test_neighbours_of_phones_in_non_words_occur_in_other_words(seed):
    for word, nonword in words.draw(seed, len(WORDS)):
        others = [other for other in WORDS if other != word]
        new = set(bigrams(nonword)) - set(bigrams(word.phones))
        assert new
        assert new <= {pair for other in others for pair in bigrams(other.phones)}
        assert set(classes(nonword)) <= {three for other in WORDS for three in classes(other.phones)}


def test_phones_of_words_and_non_words_are_equally_common():
    table = words.Phonotactics(WORDS)
    for seed in SEEDS:
        pairs = words.draw(seed, len(WORDS))
        right, wrong = (
            sum(table.commonness(phones, pair.word.phones) for pair in pairs for phones in [pick(pair)]) / len(pairs)
            for pick in (lambda pair: pair.word.phones, lambda pair: pair.nonword)
        )
        assert abs(right - wrong) < 0.05 * right


def test_a_small_set_has_every_band():
    assert {pair.word.frequency for pair in words.draw(0, 5)} == {0, 3, 10, 50, 300}


# Sentences


def test_sentences_come_once_and_have_as_many_words_as_their_partner():
    pairs = sentences.draw(0, 260)
    texts = [text for pair in pairs for text in (pair.right, pair.wrong)]
    assert len(set(texts)) == len(texts)
    for pair in pairs:
        assert len(pair.right.split()) == len(pair.wrong.split())
        for text in (pair.right, pair.wrong):
            assert text[0].isupper()
            assert text.endswith(".")
            assert "{" not in text
    assert len({pair.type for pair in pairs}) >= 5
    assert len({(pair.type, pair.subtype, pair.id) for pair in pairs}) == len(pairs)


def test_no_word_tells_what_is_right_where_both_forms_can_be_right():
    """Over all pairs of such a template, a form that replaces another is right as often as wrong."""
    pairs = sentences.draw(0, 26 * 20)
    balanced = [
        *[("anaphor_agreement", "gender"), ("filler_gap", "object"), ("filler_gap", "relative_clause")],
        ("subject_verb_agreement", "attractor"),
    ]
    for kind in balanced:
        right, wrong = Counter(), Counter()
        for pair in pairs:
            if (pair.type, pair.subtype) == kind:
                right.update(pair.right.split())
                wrong.update(pair.wrong.split())
        assert right == wrong, kind


def test_verbs_of_relative_clauses_agree_in_both_sentences():
    plural = {noun for _, noun in sentences._PEOPLE}
    checked = 0
    for pair in sentences.draw(0, 26 * 10):
        if (pair.type, pair.subtype) in (("npi_licensing", "scope"), ("subject_verb_agreement", "relative_clause")):
            for text in (pair.right, pair.wrong):
                _, _, _, _, noun, verb, *_ = text.rstrip(".").split()
                assert (noun in plural) != verb.endswith("s"), text
                checked += 1
    assert checked == 80


# Stories


def test_stories_have_four_sentences_and_endings_of_the_same_length():
    found = stories.read_stories()
    assert len(found) >= 24
    assert len({text for story in found for text in story}) == 3 * len(found)
    for start, right, wrong in found:
        assert start.count(".") == 4
        assert len(right.split()) == len(wrong.split())


@pytest.mark.parametrize("count", [2, 3, 24])
def test_topic_endings_are_the_right_ones_of_other_stories_each_once(count):
    for seed in SEEDS:
        drawn = stories.draw(seed, count)
        assert len({story.id for story in drawn}) == count
        assert sorted(story.topic for story in drawn) == sorted(story.right for story in drawn)
        assert all(story.topic != story.right for story in drawn)


# More than there is


@pytest.mark.parametrize(
    ("draw", "count", "message"),
    [
        (words.draw, 1000, "--pairs 1000 is more than the .* words"),
        (sentences.draw, 10_000, "--pairs 10000 is more than there are sentences"),
        (stories.draw, 1, "--stories 1 cannot be made"),
        (stories.draw, 25, "--stories 25 cannot be made: give 2 to 24"),
    ],
)
def test_more_than_there_is_is_refused(draw, count, message):
    with pytest.raises(InputError, match=message):
        draw(0, count)
