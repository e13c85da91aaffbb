"""The licence in a model card."""

import pytest

from ttt_jax.checkpoints import weights
from ttt_jax.convert import export, kyutai, model_card


@pytest.mark.parametrize(
    ("front", "licence"),
    [
        ("license: cc-by-4.0", "cc-by-4.0"),
        ("license: 'cc-by-4.0'  # as Kyutai", "cc-by-4.0"),
        ("license:\n  - cc-by-4.0\n  - 'mit'\nlanguage:\n  - en", "cc-by-4.0, mit"),
        ("license: [\n  cc-by-4.0,\n  mit,\n]\ntags: [x]", "cc-by-4.0, mit"),
        ("license: other\nlicense_name: own-terms\nlicense_link: LICENSE", "own-terms (LICENSE)"),
        (
            "license: other\nlicense_name: it\nlicense_link: >-\n  https://a.com/\nlanguage:\n- en",
            "it (https://a.com/)",
        ),
        ("license: other\nlicense_name: 'terms of ours'", "terms of ours"),
        ("license: other", "other"),
        ("license:\nlanguage: en", "unknown"),
        ("license: null", "unknown"),
        ("language: en\ntags:\n- license:mit", "unknown"),
        ("license_name: mine", "unknown"),
        ("license: [mit", "unknown"),
        ("license: other\nlicense_name: O'Neill's licence\nlicense_link: LICENSE", "O'Neill's licence (LICENSE)"),
        ("license: other\nlicense_name: 'O''Neill''s licence'", "O'Neill's licence"),
        ('license: other\nlicense_name: "the \\"free\\" one: # 2"', 'the "free" one: # 2'),
        ("license: other\nlicense_name: '[draft] mine'", "[draft] mine"),
        ("license: other\nlicense_name: 'null'", "null"),
    ],
)
def test_the_licence_of_a_card(front, licence):
    text = f"---\n{front}\n---\n# A model\nlicense: gpl\n"
    for card in (text, text.replace("\n", "\r\n"), "\ufeff" + text):
        assert model_card.licence(card) == licence
    assert model_card.licence(model_card.front_matter(licence) + "# A model\n") == licence


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("mit", "license: mit\n"),
        ("cc-by-4.0, mit", "license:\n- cc-by-4.0\n- mit\n"),
        ("O'Neill's licence", "license: other\nlicense_name: 'O''Neill''s licence'\n"),
        ("a, b c", "license: other\nlicense_name: 'a, b c'\n"),
        ("unknown", ""),
    ],
)
def test_the_licence_in_a_card_is_yaml(licence, expected):
    assert model_card.front_matter(licence) == (expected and f"---\n{expected}---\n\n")


@pytest.mark.parametrize(
    "text", ["", "# A model\nlicense: mit\n", "---\nlicense: mit\n", "text\n---\nlicense: mit\n---\n"]
)
def test_a_card_without_a_licence(text):
    assert model_card.licence(text) == model_card.UNKNOWN


def test_a_list_of_licences_travels(source):
    (source / "README.md").write_text("---\nlicense:\n- cc-by-4.0\n- mit\n---\n")
    kyutai(source, source.parent / "ours")
    export(source.parent / "ours", source.parent / "back")
    kyutai(source.parent / "back", source.parent / "again")
    assert weights.load(source.parent / "again").info["source"]["licence"] == "cc-by-4.0, mit"
