import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alphaquant.calibration import calibration_tokens, needs_tokenizer
from alphaquant.calibration.mix import Part, apportion, parse_mix
from alphaquant.errors import CalibrationError


def write_ids(path, first, rows=20, length=8):
    path.write_text(str([[first + i] * length for i in range(rows)]))
    return str(path)


@pytest.fixture
def two_files(tmp_path):
    return write_ids(tmp_path / "low.json", 0), write_ids(tmp_path / "high.json", 100)


def draw(source, num_samples=10):
    return calibration_tokens(source, None, num_samples=num_samples, seqlen=8, seed=0, vocab_size=200)


def test_windows_come_by_share_in_the_order_given(two_files):
    low, high = two_files
    batch = draw(f"{low}:0.3,{high}:0.7")
    assert (batch.ids[:, 0] < 100).tolist() == [True] * 3 + [False] * 7
    assert torch.equal(batch.ids[:3], draw(low, 3).ids)
    assert batch.source == f"{low}:0.3,{high}:0.7"
    assert batch.num_available == 320
    assert batch.digest not in {draw(low, 3).digest, draw(f"{low}:0.7,{high}:0.3").digest}


def test_one_text_with_all_of_it_is_that_text(two_files):
    assert torch.equal(draw(f"{two_files[0]}:1").ids, draw(two_files[0]).ids)


def test_an_existing_file_wins_over_a_mix(tmp_path):
    odd = write_ids(tmp_path / "a:0.5,b:0.5.json", 7)
    assert parse_mix(odd) == [Part(odd, 1.0)]
    assert draw(odd, 20).ids.min() == 7


def test_a_colon_in_a_name_is_no_share():
    assert parse_mix("C:/texts/a.txt") == [Part("C:/texts/a.txt", 1.0)]
    assert parse_mix("C:/a.txt:0.5,c4:0.5") == [Part("C:/a.txt", 0.5), Part("c4", 0.5)]


def test_a_share_of_no_window_is_told(two_files):
    low, high = two_files
    batch = draw(f"{low}:0.99,{high}:0.01")
    assert (batch.ids < 100).all()
    assert any(high in warning for warning in batch.warnings)


@pytest.mark.parametrize(
    ("mix", "what"),
    [
        ("wikitext2:0.4,c4:0.4", "sum to 0.8"),
        ("wikitext2:0.6,c4:0.6", "sum to 1.2"),
        ("wikitext2:0.5,c4", "'c4'"),
        ("wikitext2,c4", "'wikitext2'"),
        ("wikitext2:1.5,c4:-0.5", "1.5"),
        ("wikitext2:nan,c4:1", "nan"),
        (":0.5,c4:0.5", "':0.5'"),
        ("wikitext2:0.5,,c4:0.5", "''"),
        ("wikitext2:0.7", "sum to 0.7"),
    ],
)
def test_a_wrong_mix_names_what_is_wrong_and_the_remedy(mix, what):
    with pytest.raises(CalibrationError) as info:
        draw(mix)
    assert what in info.value.what
    assert info.value.where == mix
    assert "wikitext2:0.4" in info.value.remedy


def test_a_tokenizer_is_needed_for_any_text(two_files):
    low, high = two_files
    assert not needs_tokenizer(f"{low}:0.5,{high}:0.5")
    assert needs_tokenizer(f"{low}:0.5,wikitext2:0.5")
    assert needs_tokenizer("wikitext2")


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=8), st.integers(1, 5000))
def test_windows_are_apportioned_to_the_last_one(weights, total):
    parts = [Part(str(i), weight / sum(weights)) for i, weight in enumerate(weights)]
    counts = apportion(total, parts)
    assert sum(counts) == total
    assert all(abs(count - part.share * total) < 1 + 1e-5 for count, part in zip(counts, parts, strict=True))
