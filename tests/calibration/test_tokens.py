import hashlib
import json
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from alphaquant.calibration import Tokenizer, calibration_tokens, evaluation_windows, load_tokenizer
from alphaquant.calibration import tokens as tokens_module
from alphaquant.calibration.apart import encode_apart
from alphaquant.errors import CalibrationError

TEXT = "".join(f"The {i}th expert routes {i * i} tokens, and the router keeps its weight.\n" for i in range(300))
MESSAGES = [{"role": "user", "content": "hi <b>"}, {"role": "assistant", "content": "ho"}]
TEMPLATE = """{{ bos_token }}{% for message in messages %}
    {% if true %}
<{{ message.role }}>{{ message.content }}
    {% endif %}
{% endfor %}
{{ eos_token }}{% if add_generation_prompt %}<assistant>{% endif %}"""
RENDERED = "<s><user>hi <b>\n<assistant>ho\n</s>"


def error_of(call, *args, **kwargs):
    with pytest.raises(CalibrationError) as info:
        call(*args, **kwargs)
    assert info.value.where
    assert info.value.remedy
    return info.value


def make_model(path, config=None):
    """A directory with a byte-level BPE tokenizer that starts each text with <s>, and would cut and pad it."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator([TEXT], trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.enable_truncation(8)
    backend.enable_padding(length=16)
    path.mkdir(exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    return load_tokenizer(model_dir)


@pytest.fixture
def text_file(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


def draw(source, tokenizer, num_samples=4, seqlen=16, seed=0, vocab_size=400):
    return calibration_tokens(
        source, tokenizer, num_samples=num_samples, seqlen=seqlen, seed=seed, vocab_size=vocab_size
    )


def windows(source, tokenizer, seqlen=16, max_windows=None, vocab_size=400):
    return evaluation_windows(source, tokenizer, seqlen=seqlen, max_windows=max_windows, vocab_size=vocab_size)


# The tokenizer.


def test_encode_is_whole_and_has_special_tokens(model_dir, tokenizer):
    reference = tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    reference.no_truncation()
    reference.no_padding()
    ids = tokenizer.encode(TEXT)
    assert ids == reference.encode(TEXT).ids
    assert ids[0] == 0
    assert tokenizer.decode(ids) == "<s>" + TEXT
    assert tokenizer.encode("hi") == [0, *tokenizer.encode_batch(["hi"], special_tokens=False)[0]]


def test_no_tokenizer_json(tmp_path):
    error = error_of(load_tokenizer, tmp_path)
    assert error.where == str(tmp_path / "tokenizer.json")
    assert "save_pretrained" in error.remedy


@pytest.mark.parametrize("content", ["{", "{}", "\xff"])
def test_broken_tokenizer_json(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content, encoding="latin-1")
    assert "tokenizer.json cannot be read" in error_of(load_tokenizer, tmp_path).what


@pytest.mark.parametrize(
    "template", [TEMPLATE, [{"name": "tools", "template": "no"}, {"name": "default", "template": TEMPLATE}]]
)
def test_chat_template_of_the_config(tmp_path, template):
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None, "chat_template": template}
    assert load_tokenizer(make_model(tmp_path / "m", config)).render_chat(MESSAGES) == RENDERED


def test_chat_template_file_wins(tmp_path):
    directory = make_model(tmp_path / "m", {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "no"})
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    assert load_tokenizer(directory).render_chat(MESSAGES) == RENDERED


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE,
        "{{ messages | tojson }} {{ messages[0] | tojson(indent=2) }}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}",
        "{{ tools is none }}{{ documents is none }}{{ cls_token is defined }}",
    ],
)
def test_chat_renders_as_in_transformers(tmp_path, template):
    directory = make_model(tmp_path / "m", {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template})
    reference = PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"), bos_token="<s>", eos_token="</s>", chat_template=template
    )
    expected = reference.apply_chat_template(MESSAGES, tokenize=False)
    assert load_tokenizer(directory).render_chat(MESSAGES) == expected


def test_todays_date_does_not_reach_the_text(tmp_path):
    directory = make_model(tmp_path / "m", {"chat_template": "{{ strftime_now('%d %b %Y') }}"})
    assert load_tokenizer(directory).render_chat(MESSAGES) == "01 Jan 2025"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (None, "no chat template"),
        ({}, "no chat template"),
        ({"chat_template": [{"name": "other", "template": "x"}]}, "no chat template"),
        ([1], "no JSON object"),
        ({"chat_template": "{% for %}"}, "malformed"),
        ({"chat_template": "{{ raise_exception('roles must alternate') }}"}, "roles must alternate"),
        ({"chat_template": "{{ messages[0].content + 1 }}"}, "does not take the messages"),
        ({"chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}"}, "SecurityError"),
        ({"chat_template": "{{ messages.append(1) }}"}, "SecurityError"),
    ],
)
def test_chat_template_errors(tmp_path, config, says):
    assert says in error_of(load_tokenizer(make_model(tmp_path / "m", config)).render_chat, MESSAGES).what


def test_chat_template_files_that_cannot_be_read(tmp_path):
    directory = make_model(tmp_path / "m")
    (directory / "tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json" in error_of(load_tokenizer(directory).render_chat, MESSAGES).what
    (directory / "tokenizer_config.json").write_text("{}")
    (directory / "chat_template.jinja").write_bytes(b"\xff")
    assert "chat_template.jinja" in error_of(load_tokenizer(directory).render_chat, MESSAGES).what


# Calibration windows.


@pytest.mark.parametrize("seed", [0, 7])
def test_windows_are_those_of_the_gptq_protocol(model_dir, tokenizer, text_file, seed):
    reference = tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    reference.no_truncation()
    reference.no_padding()
    ids = reference.encode(Path(text_file).read_text()).ids
    start = torch.randint(0, len(ids) - 16, (32,), generator=torch.Generator().manual_seed(seed))
    expected = [ids[i : i + 16] for i in start.tolist()]
    batch = draw(text_file, tokenizer, num_samples=32, seed=seed)
    assert batch.ids.tolist() == expected
    assert batch.ids.dtype == torch.int64
    assert batch.num_available == len(ids)
    assert batch.source == text_file
    assert batch.warnings == ()


def test_draws_do_not_touch_the_global_generator(tokenizer, text_file):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    draw(text_file, tokenizer)
    assert torch.rand(3).equal(expected)


def test_digest_is_that_of_shape_and_ids(tokenizer, text_file):
    batch = draw(text_file, tokenizer)
    ids = batch.ids
    assert batch.digest == hashlib.sha256(b"[4, 16]" + ids.numpy().tobytes()).hexdigest()
    assert draw(text_file, tokenizer).digest == batch.digest
    assert draw(text_file, tokenizer, seed=1).digest != batch.digest


def test_too_few_windows_are_capped_with_a_warning(tokenizer, text_file):
    available = len(tokenizer.encode(TEXT))
    batch = draw(text_file, tokenizer, num_samples=100_000)
    assert batch.ids.shape == (available // 16, 16)
    (warning,) = batch.warnings
    assert str(available // 16) in warning
    assert "100000" in warning
    exact = draw(text_file, tokenizer, num_samples=available // 16)
    assert exact.warnings == ()
    assert exact.ids.equal(batch.ids)


def test_text_of_one_window_exactly(tokenizer, text_file):
    ids = tokenizer.encode(TEXT)
    batch = draw(text_file, tokenizer, num_samples=3, seqlen=len(ids))
    assert batch.ids.tolist() == [ids]
    assert len(batch.warnings) == 1
    assert windows(text_file, tokenizer, seqlen=len(ids)).ids.tolist() == [ids]


@pytest.mark.parametrize("call", [draw, windows])
def test_text_shorter_than_a_window(tokenizer, text_file, call):
    available = len(tokenizer.encode(TEXT))
    error = error_of(call, text_file, tokenizer, seqlen=available + 1)
    assert str(available) in error.what
    assert str(available + 1) in error.what
    assert "--seqlen" in error.remedy


@pytest.mark.parametrize("call", [draw, windows])
def test_id_outside_the_vocabulary(tokenizer, text_file, call):
    ids = call(text_file, tokenizer).ids
    limit = int(ids.max())
    row = int((ids == limit).any(1).nonzero()[0])
    error = error_of(call, text_file, tokenizer, vocab_size=limit)
    assert f"id {limit} in row {row} " in error.what
    assert call(text_file, tokenizer, vocab_size=limit + 1).ids.equal(ids)


@pytest.mark.parametrize(
    ("call", "option"), [(draw, "num_samples"), (draw, "seqlen"), (windows, "seqlen"), (windows, "max_windows")]
)
def test_numbers_must_be_positive(tokenizer, text_file, call, option):
    error = error_of(call, text_file, tokenizer, **{option: 0})
    assert option in error.what


@pytest.mark.parametrize("call", [draw, windows])
def test_text_without_a_tokenizer(text_file, call):
    assert "tokenizer" in error_of(call, text_file, None).what


def test_split_reaches_the_source(tokenizer, monkeypatch):
    asked = []

    def load_text(source, *, split):
        asked.append(split)
        return TEXT

    monkeypatch.setattr("alphaquant.calibration.tokens.load_text", load_text)
    draw("bundled", tokenizer)
    windows("bundled", tokenizer)
    calibration_tokens("bundled", tokenizer, num_samples=1, seqlen=4, seed=0, vocab_size=400, split="evaluation")
    assert asked == ["calibration", "evaluation", "evaluation"]


# Documents.


def test_documents_are_encoded_apart_and_joined_in_order(tmp_path):
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    tokenizer = load_tokenizer(make_model(tmp_path / "m", config))
    lines = [{"text": "The router"}, {"messages": MESSAGES}, {"text": "weight."}]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    chat = tokenizer.encode_batch([RENDERED], special_tokens=False)[0]
    expected = [*tokenizer.encode("The router"), *chat, *tokenizer.encode("weight.")]
    assert chat.count(0) == 1  # <s> comes from the template alone
    batch = windows(str(file), tokenizer, seqlen=len(expected))
    assert batch.ids.tolist() == [expected]


def test_chat_that_the_template_refuses_is_named(tmp_path):
    directory = make_model(tmp_path / "m", {"chat_template": "{{ raise_exception('no system role') }}"})
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "hi"}\n' + json.dumps({"messages": MESSAGES}))
    error = error_of(draw, str(file), load_tokenizer(directory))
    assert "no system role" in error.what
    assert f"{file}:2" in error.where


# Evaluation windows.


def test_windows_lie_side_by_side(tokenizer, text_file):
    ids = tokenizer.encode(TEXT)
    num = len(ids) // 16
    batch = windows(text_file, tokenizer)
    assert batch.ids.flatten().tolist() == ids[: num * 16]
    assert batch.ids.shape == (num, 16)
    assert batch.num_available == len(ids)
    assert batch.warnings == ()
    some = windows(text_file, tokenizer, max_windows=3)
    assert some.ids.equal(batch.ids[:3])
    assert some.digest != batch.digest
    (warning,) = windows(text_file, tokenizer, max_windows=num + 1).warnings
    assert f"{num} windows" in warning
    assert f"{num + 1} asked" in warning


# Pre-tokenised rows.


def save_rows(path, rows):
    path.write_text(json.dumps(rows))
    return str(path)


def test_rows_as_given_and_cut(tmp_path):
    source = save_rows(tmp_path / "a.json", [[1, 2, 3, 4], [5, 6, 7]])
    batch = draw(source, None, num_samples=2, seqlen=3)
    assert batch.ids.tolist() == [[1, 2, 3], [5, 6, 7]]
    assert batch.num_available == 7
    assert batch.warnings == ()
    (warning,) = draw(source, None, num_samples=5, seqlen=3).warnings
    assert "2 windows" in warning
    assert "5 asked" in warning


def test_more_rows_than_samples_are_permuted_by_the_seed(tmp_path):
    ids = torch.arange(300).view(100, 3)
    save_file({"input_ids": ids}, tmp_path / "a.safetensors")
    source = str(tmp_path / "a.safetensors")
    order = torch.randperm(100, generator=torch.Generator().manual_seed(5))[:10]
    assert draw(source, None, num_samples=10, seqlen=3, seed=5).ids.equal(ids[order])
    assert draw(source, None, num_samples=100, seqlen=3, seed=5).ids.equal(ids)
    assert windows(source, None, seqlen=3, max_windows=10).ids.equal(ids[:10])
    assert windows(source, None, seqlen=3).ids.equal(ids)


@pytest.mark.parametrize("call", [draw, windows])
def test_short_row(tmp_path, call):
    source = save_rows(tmp_path / "a.json", [[1, 2, 3], [4, 5]])
    error = error_of(call, source, None, seqlen=3)
    assert "row 1 holds 2 tokens" in error.what
    assert "--seqlen" in error.remedy


@pytest.mark.parametrize("call", [draw, windows])
@pytest.mark.parametrize("bad", [400, -1])
def test_row_with_an_id_outside_the_vocabulary(tmp_path, call, bad):
    source = save_rows(tmp_path / "a.json", [[1, 2, 3, 999], [4, bad, 5]])
    error = error_of(call, source, None, seqlen=3)  # the 999 is cut away
    assert f"id {bad} in row 1 " in error.what


def test_a_process_of_its_own_gives_the_same_ids(tmp_path, monkeypatch):
    from importlib.resources import files  # noqa: PLC0415

    tokenizer = load_tokenizer(str(files("alphaquant") / "data" / "demo-model"))
    text = "Élan, \u4e2d\u6587 and the State of the Union.\n" * 50
    expected = tokenizer.encode(text)
    assert tokenizer.encode_tensor(text).tolist() == expected
    monkeypatch.setattr(tokens_module, "LONG_TEXT", 10)
    monkeypatch.setattr(Tokenizer, "encode", None)
    found = tokenizer.encode_tensor(text)
    assert found.dtype == torch.int64
    assert found.tolist() == expected


def test_a_process_that_fails_is_named():
    with pytest.raises(CalibrationError, match="cannot be tokenised"):
        encode_apart("{}", "text")
