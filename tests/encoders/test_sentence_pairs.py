"""Next-sentence prediction and whole-word masking: pairs, masks and losses against plain transformers on the same pieces."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForMaskedLM,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    PreTrainedTokenizerFast,
)

from align.data.rows import Passage
from align.encoders import classify
from align.encoders.masking import Masking
from align.encoders.mlm import run
from align.encoders.sentence_pairs import FOLLOWS, OTHER_TEXT, draw_seconds, tokenize_pairs
from align.encoders.tokenize import check_words, tokenize_passages
from align.errors import UserError
from tests.documented_metrics import undocumented
from tests.encoders import test_classify
from tests.encoders.test_mlm import HELD_OUT, masking_tokenizer, recipe, save_tiny_encoder
from tests.ranks import run_stage
from tests.worlds import deepspeed_file, letter_ids, metrics, save_recipe, trained

TEXTS = ["abcabcabcabcab", "xyzxyz", "abcabd", "zzyyxx", "mnopqrstuvw", "ccbbaa", "q", "klkl"]


def pair_tokenizer():
    tokenizer = masking_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s>:0 $A:0 </s>:0 $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


def passages(texts=TEXTS):
    return [Passage(text, str(number)) for number, text in enumerate(texts)]


def pairs_recipe(folder: Path, cls=BertForMaskedLM, **changes):
    base = save_tiny_encoder(folder / "base", cls)
    pair_tokenizer().save_pretrained(base)
    return recipe(folder, TEXTS, next_sentence_prediction=True, **changes)


class TestPairs:
    def test_every_token_is_in_one_pair_and_half_of_the_second_pieces_are_of_other_texts(self):
        rows = tokenize_pairs(passages(), pair_tokenizer(), 9, 3, "train_dataset", False)
        halves = []
        for row in rows:
            ids, types = row["input_ids"], row["token_type_ids"]
            first, second = (
                [each for each, kind in zip(ids, types, strict=True) if kind == side and each > 2] for side in (0, 1)
            )
            halves.append((first, second, row["next_sentence_label"]))
            letters = ["".join(chr(each - 3 + ord("a")) for each in half) for half in (first, second)]
            whole = pair_tokenizer()(*letters)
            assert (whole["input_ids"], whole["token_type_ids"]) == (ids, types)
            assert len(ids) <= 9
        texts = [text for text in TEXTS if len(text) > 1]
        assert sorted(each for first, second, _ in halves for each in first + second) == sorted(
            letter_ids("".join(texts))
        )
        labels = [label for *_, label in halves]
        assert labels.count(OTHER_TEXT) == len(labels) // 2
        joined = [letter_ids(text) for text in texts]

        def together(first, second):
            both = first + second
            return any(both == text[place : place + len(both)] for text in joined for place in range(len(text)))

        for first, second, label in halves:
            assert together(first, second) == (label == FOLLOWS)

    def test_the_words_of_both_pieces_are_different_words(self):
        for row in tokenize_pairs(passages(), pair_tokenizer(), 9, 3, "train_dataset", True):
            words = [word for word, each in zip(row["words"], row["input_ids"], strict=True) if each > 2]
            assert len({*words}) == len(words)  # a letter is a word
            assert [word for word, each in zip(row["words"], row["input_ids"], strict=True) if each <= 2] == [-1] * 3

    def test_no_pair_that_is_drawn_keeps_its_text(self):
        texts = [number // 3 for number in range(60)]
        order, labels = draw_seconds(texts, 0, "k")
        assert sorted(order) == list(range(60))
        assert labels.count(OTHER_TEXT) == 30
        for pair, (other, label) in enumerate(zip(order, labels, strict=True)):
            assert (other == pair) == (label == FOLLOWS)
            assert label == FOLLOWS or texts[other] != texts[pair]
        assert draw_seconds(texts, 0, "k")[0] == order != draw_seconds(texts, 1, "k")[0]

    def test_too_few_texts(self):
        with pytest.raises(
            UserError, match="train_dataset: next_sentence_prediction takes the second piece of half of the 7 pairs"
        ):
            tokenize_pairs(passages(["abcdefghijklmnopqrst" * 2]), pair_tokenizer(), 9, 0, "train_dataset", False)


class TestTraining:
    def test_a_step_is_the_sum_of_the_means_that_plain_transformers_gives(self, tmp_path):
        settings = pairs_recipe(tmp_path, max_steps=1, per_device_train_batch_size=2, train_batch_size=16)
        run(settings)
        rows = tokenize_pairs(passages(), pair_tokenizer(), 16, settings.seed, "k", False)
        masking = Masking(pair_tokenizer(), settings.mlm_probability, settings.seed)
        torch.manual_seed(settings.seed)
        model = BertForPreTraining.from_pretrained(settings.model_name_or_path).eval()
        batch = masking(list(rows))
        weight = batch.pop("weight")
        output = model(**batch)
        log = metrics(settings)[0]
        assert log["train/loss"] == pytest.approx(float(output.loss), abs=1e-5)
        assert int(weight.sum()) > 4
        output.loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        assert log["train/grad_norm"] == pytest.approx(float(norm), rel=1e-4)

    def test_evaluation_and_the_model_that_is_saved(self, tmp_path):
        settings = pairs_recipe(tmp_path, eval_texts=HELD_OUT)
        results = run(settings)
        rows = tokenize_pairs(passages(HELD_OUT), pair_tokenizer(), 16, settings.seed, "k", False)
        model = BertForPreTraining.from_pretrained(settings.output_dir).eval()
        logits = [
            model(torch.tensor([row["input_ids"]]), token_type_ids=torch.tensor([row["token_type_ids"]]))
            for row in Masking(pair_tokenizer(), settings.mlm_probability, settings.seed).mask_once(rows)
        ]
        chances = torch.cat([each.seq_relationship_logits for each in logits]).log_softmax(-1)
        labels = torch.tensor(rows["next_sentence_label"][:])
        loss = -chances.gather(1, labels[:, None]).mean()
        assert results.metrics["eval_next_sentence_loss"] == pytest.approx(float(loss), abs=1e-5)
        hits = (chances.argmax(-1) == labels).float().mean()
        assert results.metrics["eval_next_sentence_accuracy"] == pytest.approx(float(hits))
        assert undocumented({name for line in metrics(settings) for name in line} - {"step", "time"}) == []
        AutoModelForMaskedLM.from_pretrained(settings.output_dir)
        again = recipe(
            tmp_path, model_name_or_path=settings.output_dir, output_dir=str(tmp_path / "again"), max_steps=1
        )
        run(again)

    def test_a_model_without_the_head(self, tmp_path):
        config = DistilBertConfig(
            vocab_size=30, dim=16, hidden_dim=32, n_layers=1, n_heads=2, max_position_embeddings=16
        )
        DistilBertForMaskedLM(config).save_pretrained(tmp_path / "base")
        pair_tokenizer().save_pretrained(tmp_path / "base")
        with pytest.raises(UserError, match="transformers has no head for it on models of type distilbert"):
            run(recipe(tmp_path, TEXTS, next_sentence_prediction=True))

    @pytest.mark.slow
    def test_two_ranks_train_what_one_does(self, tmp_path):
        alone = pairs_recipe(tmp_path, num_train_epochs=2)
        run(alone)
        together = dataclasses.replace(
            alone, output_dir=str(tmp_path / "two"), deepspeed=deepspeed_file(tmp_path / "ds.json", 2)
        )
        done = run_stage("mlm", save_recipe(together, tmp_path / "two.yaml"), ranks=2)
        assert done.returncode == 0, done.stderr[-3000:]
        other = trained(together)
        for name, weight in trained(alone).items():
            torch.testing.assert_close(other[name], weight, atol=5e-5, rtol=0)


def trained_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of a few letters' pieces, so that most words have several tokens."""
    special = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece({}, unk_token="<unk>"))
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=60, special_tokens=special)
    elif kind == "byte-level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=280, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
    else:
        tokenizer = Tokenizer(models.Unigram())
        if kind == "sentencepiece":
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>")
    tokenizer.train_from_iterator([SENTENCE] * 3, trainer)
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


SENTENCE = "the striped caterpillars considered unquestionably extraordinary arrangements, notwithstanding difficulties"


class TestWholeWords:
    @pytest.mark.parametrize("kind", ["wordpiece", "byte-level", "sentencepiece"])
    def test_words_are_masked_whole_and_the_share_is_the_probability(self, kind):
        tokenizer = trained_tokenizer(kind)
        check_words(tokenizer, "p")
        (piece,) = tokenize_passages([Passage(SENTENCE, "1")], tokenizer, 512, whole_words=True)
        encoded = tokenizer(SENTENCE, add_special_tokens=False)
        assert piece["words"] == encoded.word_ids()
        assert len(piece["words"]) > 2 * len(set(piece["words"]))
        masking = Masking(tokenizer, 0.3, 0, whole_words=True)
        chosen = []
        for draw in range(400):
            masked, labels = masking.mask(piece["input_ids"], 0, draw, piece["words"])
            there = labels != -100
            for word in set(piece["words"]):
                assert len({bool(there[place]) for place, each in enumerate(piece["words"]) if each == word}) == 1
            assert labels[there].tolist() == torch.tensor(piece["input_ids"])[there].tolist()
            assert masked[~there].tolist() == torch.tensor(piece["input_ids"])[~there].tolist()
            chosen.append((there.float().mean(), (masked[there] == tokenizer.mask_token_id).float().sum(), there.sum()))
            around = masking.mask([2, piece["input_ids"][0], 2], 0, draw, [-1, 0, -1])[1]
            assert around[::2].tolist() == [-100, -100]  # </s> is no word
        share, hidden, count = (torch.stack([torch.as_tensor(each[i]) for each in chosen]).float() for i in range(3))
        # Of 400 draws of 10 words of unequal length the standard error is about 0.008.
        assert float(share.mean()) == pytest.approx(0.3, abs=0.03)
        assert float(hidden.sum() / count.sum()) == pytest.approx(0.8, abs=0.02)

    def test_a_tokenizer_that_knows_no_words(self, tmp_path):
        with pytest.raises(UserError, match=r"whole_word_mask: the tokenizer of p \(.*\) does not say which tokens"):
            check_words(trained_tokenizer("no words"), "p")
        settings = recipe(tmp_path, whole_word_mask=True)
        assert run(settings).steps == 2  # a letter is a word there


class TestAdapters:
    def test_a_new_head_is_trained_beside_lora_and_a_classifier_starts_from_it(self, tmp_path):
        base = save_tiny_encoder(tmp_path / "base", BertModel)
        settings = recipe(tmp_path, method="lora", lora_r=2, model_name_or_path=base)
        run(settings)
        before, after = BertModel.from_pretrained(base).state_dict(), trained(settings)
        moved = {
            name
            for name, weight in after.items()
            if not torch.equal(weight, before.get(name.removeprefix("bert."), weight[:0]))
        }
        assert "cls.predictions.transform.dense.weight" in moved
        assert "bert.encoder.layer.0.attention.self.query.weight" in moved
        assert "bert.embeddings.word_embeddings.weight" not in moved
        rows = [("abc", "x"), ("xyz", "y"), ("bca", "x"), ("zzy", "y")]
        changes = {"model_name_or_path": settings.output_dir, "output_dir": str(tmp_path / "classifier")}
        assert classify.run(test_classify.recipe(tmp_path, rows, **changes)).steps == 1
