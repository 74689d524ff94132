"""A recogniser on a pretrained Whisper (tiny, with random weights): what it starts from, learns, keeps and writes."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mole_asr.asr import attention_head
from mole_asr.asr.attention_head import AttentionHead
from mole_asr.asr.checkpoint import load_model, save_model
from mole_asr.asr.fine_tuning import FineTuning, choose_trained, fine_tuning_optimizer
from mole_asr.asr.losses import losses
from mole_asr.asr.pretrained import SILENCE_S, PretrainedModel
from mole_asr.asr.pretrained_encoders import load_pretrained_encoder
from mole_asr.asr.task import MoleTask
from mole_asr.asr.whisper import WhisperEncoder, WhisperFeatures
from mole_asr.asr.whisper_checkpoint import load_whisper
from mole_asr.corpus.batch import Batch
from mole_asr.corpus.text_tokenizer import TextTokenizer
from mole_asr.decode.words import WEIGHT
from mole_asr.errors import MoleError
from mole_asr.transcribe.transcriber import Transcriber
from tests.asr.test_text_search import search

from .conftest import LANGUAGES, attention_loss, build_on_whisper, make_experts_differ


@pytest.fixture
def model(whisper_folder: Path, tokenizer: TextTokenizer) -> PretrainedModel:
    return build_on_whisper(whisper_folder, tokenizer)


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"num_mole_blocks": 2, "language_tokenizer_block": 0},
        {"expert_of": "family"},
        {"routing_unit": "frame", "reliability": "entropy"},
        {"num_mole_blocks": 0, "mixture": "dense", "language_tokenizer_block": 2},
        {"mixture": "dense"},
        {"mixture": "forced", "top_k": 2},
        {"mixture": "switch", "top_k": 2},
        {"mixture": "omni", "top_k": 2},
        {"mixture": "group", "top_k": 2},
        {"mixture": "dense", "language_embedding": True},
    ],
)
def test_training_starts_from_whispers_own_function(
    whisper_folder: Path, tokenizer: TextTokenizer, batch: Batch, switches: dict[str, Any]
) -> None:
    model = build_on_whisper(whisper_folder, tokenizer, **switches).eval()
    checkpoint = load_whisper(whisper_folder)
    whisper = WhisperEncoder(checkpoint.config).eval()
    whisper.load_state_dict(checkpoint.encoder)
    features = WhisperFeatures(checkpoint.config.num_mels)
    with torch.inference_mode():
        output = model(batch.audio_BS, batch.audio_lengths_B)
        silence = round(SILENCE_S * 16000)
        audio_BS = functional.pad(batch.audio_BS, (0, silence))
        wanted_BTD, lengths_B = whisper(*features(audio_BS, batch.audio_lengths_B + silence))
    assert torch.equal(output.frames.lengths_B, lengths_B) and output.memory_BTD is not None
    assert torch.equal(output.lengths_B, lengths_B - round(SILENCE_S / model.frame_shift_s))
    for row, length in enumerate(lengths_B.tolist()):
        torch.testing.assert_close(output.memory_BTD[row, :length], wanted_BTD[row, :length], atol=2e-5, rtol=1e-4)


def test_a_saved_model_gives_the_same_output(
    model: PretrainedModel, tokenizer: TextTokenizer, batch: Batch, tmp_path: Path
) -> None:
    model.train()(batch.audio_BS, batch.audio_lengths_B)  # moves the statistics of the CTC head
    save_model(model, tokenizer, tmp_path / "model")
    again, _ = load_model(tmp_path / "model")
    assert isinstance(again, PretrainedModel) and again.config == model.config and model.attention_head is not None
    with torch.inference_mode():
        first, second = (m.eval()(batch.audio_BS, batch.audio_lengths_B) for m in (model, again))
        assert torch.equal(first.log_probs_BTV, second.log_probs_BTV)
        written = [
            m.attention_head.write(o.memory_BTD, o.frames.lengths_B, batch.languages_B)
            for m, o in ((model, first), (again, second))
            if m.attention_head is not None and o.memory_BTD is not None
        ]
    assert written[0] == written[1]


def test_the_decoders_opinion_of_the_language_is_that_of_transformers(
    model: PretrainedModel, whisper_model: Any, batch: Batch
) -> None:
    head, signs = model.attention_head, model.whisper_tokenizer
    assert head is not None and signs is not None
    with torch.no_grad():
        output = model.eval()(batch.audio_BS, batch.audio_lengths_B, batch.languages_B)
        assert output.memory_BTD is not None
        opinion_BN = head.language_opinion(output.memory_BTD, output.frames.lengths_B, ["fr", "xx", "en"])
        for row, length in enumerate(output.frames.lengths_B.tolist()):
            logits_V = whisper_model(
                encoder_outputs=(output.memory_BTD[row : row + 1, :length],),
                decoder_input_ids=torch.tensor([[signs.prompt(None)[0]]]),
            ).logits[0, 0]
            known = logits_V[list(signs.language_ids.values())].logsumexp(0)
            wanted = [float(logits_V[signs.language_ids[code]] - known) for code in ("fr", "en")]
            chance = -math.log(len(signs.language_ids))
            torch.testing.assert_close(opinion_BN[row], torch.tensor([wanted[0], chance, wanted[1]]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("routing_unit", ["utterance", "frame"])
def test_the_decoder_is_asked_for_the_language_where_none_is_given(
    whisper_folder: Path, tokenizer: TextTokenizer, batch: Batch, routing_unit: str
) -> None:
    asking, plain = (
        build_on_whisper(whisper_folder, tokenizer, second_hearing=weight, routing_unit=routing_unit).eval()
        for weight in (3.0, 0)
    )
    for model in (asking, plain):
        make_experts_differ(model)
    inputs = batch.audio_BS, batch.audio_lengths_B
    with torch.no_grad():
        first, second = plain(*inputs), asking(*inputs)
        assert asking.attention_head is not None and first.memory_BTD is not None and second.memory_BTD is not None
        opinion_BN = 3.0 * asking.attention_head.language_opinion(first.memory_BTD, first.frames.lengths_B, LANGUAGES)
        torch.testing.assert_close(second.language_logits_BN, first.language_logits_BN + opinion_BN)
        told = plain(*inputs, second.language_logits_BN.argmax(1))
        if routing_unit == "utterance":
            assert torch.equal(second.decision.heard.expert_ids, told.decision.heard.expert_ids)
        assert not torch.allclose(second.memory_BTD, first.memory_BTD, atol=1e-4)
        # Told the language, and in training, nobody is asked.
        assert torch.equal(asking(*inputs, batch.languages_B).memory_BTD, plain(*inputs, batch.languages_B).memory_BTD)
        trained = [model.train()(*inputs).language_logits_BN for model in (asking, plain)]
        assert torch.equal(*trained)


@pytest.mark.parametrize("routing_unit", ["utterance", "frame"])
def test_only_utterances_whose_language_the_decoder_changes_are_computed_again(
    whisper_folder: Path, tokenizer: TextTokenizer, batch: Batch, routing_unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_on_whisper(whisper_folder, tokenizer, second_hearing=1.0, routing_unit=routing_unit).eval()
    make_experts_differ(model)
    inputs = batch.audio_BS, batch.audio_lengths_B
    with torch.no_grad():
        first = model(*inputs, torch.full((len(batch.audio_lengths_B),), -1))  # no language is given, nobody is asked
        opinion_BN = torch.zeros_like(first.language_logits_BN)
        opinion_BN[1, first.language_logits_BN[1].argmin()] = 20.0
        monkeypatch.setattr(AttentionHead, "language_opinion", lambda *_: opinion_BN)
        second = model(*inputs)
        monkeypatch.setattr("mole_asr.asr.pretrained.SAME_RELIABILITY", -1.0)
        everything = model(*inputs)
    assert first.memory_BTD is not None and second.memory_BTD is not None and everything.memory_BTD is not None
    others = torch.arange(len(opinion_BN)) != 1
    assert torch.equal(second.memory_BTD[others], first.memory_BTD[others])
    assert not torch.allclose(second.memory_BTD[1], first.memory_BTD[1], atol=1e-3)
    torch.testing.assert_close(second.memory_BTD, everything.memory_BTD)
    assert torch.equal(second.language_logits_BN, everything.language_logits_BN)
    assert torch.equal(second.reliability_B, everything.reliability_B)


def test_an_utterance_does_not_depend_on_its_batch(model: PretrainedModel, batch: Batch) -> None:
    model.eval()
    with torch.inference_mode():
        together = model(batch.audio_BS, batch.audio_lengths_B)
        for row, samples in enumerate(batch.audio_lengths_B.tolist()):
            alone = model(batch.audio_BS[row : row + 1, :samples], batch.audio_lengths_B[row : row + 1])
            frames = int(alone.lengths_B)
            assert together.lengths_B[row] == frames
            torch.testing.assert_close(
                together.log_probs_BTV[row, :frames], alone.log_probs_BTV[0, :frames], atol=2e-4, rtol=1e-3
            )


def test_attention_loss_is_the_cross_entropy_of_each_text(model: PretrainedModel, batch: Batch) -> None:
    model.eval()
    head = model.attention_head
    assert head is not None
    with torch.inference_mode():
        output = model(batch.audio_BS, batch.audio_lengths_B, batch.languages_B)
        assert output.memory_BTD is not None
        total, count = 0.0, 0
        for row, text in enumerate(batch.texts):
            prompt, body = head.prompts[int(batch.languages_B[row])], head.tokenizer.encode(text)
            tokens = torch.tensor([[*prompt, *body, head.tokenizer.end_id]])
            lengths_1 = output.frames.lengths_B[row : row + 1]
            memory = output.memory_BTD[row : row + 1, : int(lengths_1)], lengths_1
            logits_UV = head.decoder(tokens[:, :-1], *memory)[0, len(prompt) - 1 :]
            total += functional.cross_entropy(logits_UV, tokens[0, len(prompt) :], reduction="sum").item()
            count += len(body) + 1
        assert attention_loss(model, batch, smoothing=0.0).item() == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("beam", [1, 3])
def test_search_equals_recomputing_everything(model: PretrainedModel, batch: Batch, beam: int) -> None:
    model.eval()
    head = model.attention_head
    assert head is not None
    with torch.inference_mode():
        output = model(batch.audio_BS, batch.audio_lengths_B)
        assert output.memory_BTD is not None
        languages_B = torch.tensor([0, 2, 1, -1])  # "none" has a shorter prompt
        texts = head.write(output.memory_BTD, output.frames.lengths_B, languages_B, beam)
        for row, language in enumerate(languages_B.tolist()):
            length = int(output.frames.lengths_B[row])
            prompt = list(head.prompts[language]) if language >= 0 else head.tokenizer.prompt(None)
            memory_BTD = output.memory_BTD[row : row + 1, :length]

            def chances(
                ids: list[int], prompt: list[int] = prompt, memory_BTD: Tensor = memory_BTD, length: int = length
            ) -> list[float]:
                logits_V = head.decoder(torch.tensor([prompt + ids]), memory_BTD, torch.tensor([length]))[0, -1]
                return logits_V[: head.tokenizer.end_id + 1].log_softmax(-1).tolist()

            ids, mean = search(chances, beam, length // 4 + 10, head.tokenizer.end_id)
            assert texts[row].text == head.tokenizer.decode(ids).strip()
            assert texts[row].log_prob == pytest.approx(mean, abs=1e-4)


def test_words_choose_among_the_drafts(model: PretrainedModel, batch: Batch) -> None:
    head = model.eval().attention_head
    assert head is not None
    with torch.inference_mode():
        output = model(batch.audio_BS, batch.audio_lengths_B)
        assert output.memory_BTD is not None
        inputs = output.memory_BTD, output.frames.lengths_B, batch.languages_B
        plain = head.write(*inputs, beam=4)
        assert all(each.score == each.log_prob for each in plain)
        unwanted = [
            {each.text for each, n in zip(plain, batch.languages_B.tolist(), strict=True) if n == language}
            for language in range(len(LANGUAGES))
        ]
        words = {
            language: lambda text, whole, texts=texts: -1e3 * (whole and text.strip() in texts)
            for language, texts in enumerate(unwanted)
        }
        other = head.write(*inputs, beam=4, words=words)
        assert head.write(*inputs, beam=4, words={}) == plain
    for before, after in zip(plain, other, strict=True):
        assert after.text != before.text and after.score == after.log_prob <= before.log_prob


def test_word_lists_serve_the_search(
    model: PretrainedModel, tokenizer: TextTokenizer, batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for code in LANGUAGES[1:]:
        (tmp_path / f"{code}.tsv").write_text(f"ab\t1\n{code}\t3\n", "utf-8")
    listener, head = Transcriber(model.eval(), tokenizer), model.attention_head
    assert head is not None
    listener.use_words(tmp_path)
    asked, write = list[Any](), head.write
    monkeypatch.setattr(head, "write", lambda *inputs: asked.append(inputs[-1]) or write(*inputs))
    next(listener.transcribe(batch.audio_BS[0].numpy(), language=LANGUAGES[0]))
    assert asked[0].keys() == {1, 2}, "one language has no list"
    wanted = WEIGHT * math.log(0.25)
    assert asked[0][2]("ab", True) == pytest.approx(wanted) == asked[0][2]("a", False)
    assert asked[0][2]("a", True) < wanted
    listener.choose_head("ctc")
    with pytest.raises(MoleError, match=r"^words: serve the attention head; leave --head ctc out$"):
        listener.use_words(tmp_path)


def test_no_more_drafts_at_once_than_memory_allows(
    model: PretrainedModel, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = model.eval().attention_head
    assert head is not None
    with torch.inference_mode():
        output = model(batch.audio_BS, batch.audio_lengths_B)
        inputs = output.memory_BTD, output.frames.lengths_B, batch.languages_B
        together = head.write(*inputs, beam=2)
        monkeypatch.setattr(attention_head, "MAX_DRAFTS", 4)
        rows, read = list[int](), head.decoder.read
        monkeypatch.setattr(head.decoder, "read", lambda tokens, cache: rows.append(len(tokens)) or read(tokens, cache))
        assert [each.text for each in head.write(*inputs, beam=2)] == [each.text for each in together]
        assert max(rows) == 4
        for beam in (0, 5):
            with pytest.raises(MoleError, match=f"beam {beam}: must be from 1 to 4"):
                head.write(*inputs, beam=beam)


def test_it_learns_a_few_utterances_by_heart(whisper_folder: Path, tokenizer: TextTokenizer, batch: Batch) -> None:
    # The decoder's signs of languages are random here, and stay so.
    model = build_on_whisper(whisper_folder, tokenizer, second_hearing=0.0)
    # Noise of one length and level, in two languages: nothing tells the second and the last apart.
    batch.audio_lengths_B[3] = 8000
    batch.audio_BS[3, 8000:] = 0
    optimizer, schedule = fine_tuning_optimizer(model, 2, FineTuning(lr=3e-3, new_lr=3e-3, new_parts_share=0), steps=90)
    choose_trained(model, 2, FineTuning(new_parts_share=0), 1, 2)
    for _ in range(90):
        output = model(batch.audio_BS, batch.audio_lengths_B, batch.languages_B)
        total = sum(losses(output, batch).values(), torch.zeros(())) + attention_loss(model, batch)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        schedule.step()
    transcriber = Transcriber(model.eval(), tokenizer)
    waves = [audio_S[:n].numpy() for audio_S, n in zip(batch.audio_BS, batch.audio_lengths_B.tolist(), strict=True)]
    by_head = {}
    for head, precision in (
        ("attention", "bf16-mixed"),
        ("ctc", "bf16-mixed"),
        ("attention", "32-true"),
        ("ctc", "32-true"),
    ):
        transcriber.choose_head(head)  # type: ignore[arg-type]
        transcriber.precision = precision  # type: ignore[assignment]
        transcripts = list(transcriber.transcribe(waves))
        by_head[head, precision] = [t.text for t in transcripts]
        assert [t.language for t in transcripts] == [LANGUAGES[n] for n in batch.languages_B.tolist()]
        words = [word for t in transcripts for segment in t.segments for word in segment.words]
        assert all(0 <= word.start_s <= word.end_s and 0 < word.confidence <= 1 for word in words)
    assert all(texts == batch.texts for texts in by_head.values()), by_head


def test_without_an_attention_head(whisper_folder: Path, tokenizer: TextTokenizer, batch: Batch) -> None:
    model = build_on_whisper(whisper_folder, tokenizer, attention_head=False)
    assert not any("decoder" in name for name, _ in model.named_parameters())
    transcriber = Transcriber(model.eval(), tokenizer)
    with pytest.raises(MoleError, match="has no attention head"):
        transcriber.choose_head("attention")
    list(transcriber.transcribe(batch.audio_BS[0].numpy()))


@pytest.mark.parametrize("name", ["wav2vec2", "w2v_bert"])
def test_on_other_encoders(name: str, tokenizer: TextTokenizer, batch: Batch, tmp_path: Path) -> None:
    source = _other_encoder(name, tmp_path / "source")
    model = build_on_whisper(source, tokenizer).eval()
    plain = load_pretrained_encoder(source)
    with torch.inference_mode():
        output = model(batch.audio_BS, batch.audio_lengths_B)
        wanted_BTD, lengths_B = plain(batch.audio_BS, batch.audio_lengths_B)
    assert torch.equal(output.lengths_B, lengths_B) and output.memory_BTD is not None
    for row, length in enumerate(lengths_B.tolist()):
        torch.testing.assert_close(output.memory_BTD[row, :length], wanted_BTD[row, :length], atol=2e-4, rtol=1e-3)
    assert model.attention_head is None
    named = losses(model.train()(batch.audio_BS, batch.audio_lengths_B, batch.languages_B), batch)
    sum(named.values(), torch.zeros(())).backward()
    save_model(model, tokenizer, tmp_path / "model")
    again, _ = load_model(tmp_path / "model")
    with torch.inference_mode():
        first, second = (m.eval()(batch.audio_BS, batch.audio_lengths_B) for m in (model, again))
    assert torch.equal(first.log_probs_BTV, second.log_probs_BTV)


def _other_encoder(name: str, folder: Path) -> Path:
    """A tiny model with random weights in Hugging Face's format."""
    from transformers import Wav2Vec2BertConfig, Wav2Vec2BertModel, Wav2Vec2Config, Wav2Vec2Model

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    if name == "w2v_bert":
        bert = Wav2Vec2BertConfig(**sizes, feature_projection_input_dim=160, position_embeddings_type="relative_key")
        Wav2Vec2BertModel(bert).save_pretrained(folder)
        return folder
    convolutions = {"conv_dim": (8, 8, 8), "conv_kernel": (10, 8, 4), "conv_stride": (5, 8, 8)}
    positions = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    Wav2Vec2Model(Wav2Vec2Config(**sizes, **convolutions, **positions)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"num_mole_blocks": 3}, "num_mole_blocks: 3, but the encoder has 2"),
        ({"num_mole_blocks": -1}, "num_mole_blocks: -1, but the encoder has 2"),
        ({"language_tokenizer_block": 2}, r"language_tokenizer_block: 2 must be 0\.\.1"),
        ({"expert_d_ff": 24}, "expert_d_ff: 24, but experts are copies of parts of width 48"),
        ({"temperature": 0}, "temperature: 0 must be positive"),
        ({"checkpoint": ""}, "checkpoint: names nothing to start from"),
    ],
)
def test_sizes_that_the_checkpoint_has_not(
    whisper_folder: Path, tokenizer: TextTokenizer, switches: dict[str, Any], message: str
) -> None:
    with pytest.raises(MoleError, match=rf"^model\.pretrained\.{message}"):
        build_on_whisper(whisper_folder, tokenizer, **switches)


def test_a_trained_model_to_start_from_is_not_passed_over(
    model: PretrainedModel, tokenizer_folder: Path, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    """A config of fine-tuning names Whisper; `init_from` must start from the model all the same."""
    torch.nn.init.normal_(model.ctc.linear.weight)
    save_model(model, tokenizer, tmp_path)
    for pretrained in (None, model.config):
        task = MoleTask(str(tokenizer_folder), LANGUAGES, pretrained=pretrained, init_from=str(tmp_path))
        found = task.model.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    other = replace(model.config, num_mole_blocks=0)
    with pytest.raises(MoleError, match=r"^model\.pretrained: with model\.init_from.* --model\.pretrained null"):
        MoleTask(str(tokenizer_folder), LANGUAGES, pretrained=other, init_from=str(tmp_path))
