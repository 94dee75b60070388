"""Streams of ids as text: equal to decoding all at once, whole characters only, cut before stop strings."""

import json
from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from chorus.services.detokenizer import Detokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog. Stop here, then go on.\n\nEND of it all, and all of it again.",
    "Größe, café, cafe\u0301, naïve, ÅÄÖ; привет, мир; Ἑλλάς; नमस्ते दुनिया; שלום עולם",
    "日本語のテキストと漢字、ひらがな、カタカナ。中文字符测试。한국어 텍스트",
    "😀😃😄 🤷🏽\u200d♀️ 👨\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 \U00020000 e\u0301\u0323 \ufffd",
]
SPECIAL = ["<s>", "</s>"]
EOS = 1


def byte_level() -> Tokenizer:
    """As GPT-2 and Llama 3: every id is some bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learn(tokenizer, TEXTS, trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet))
    return tokenizer


def metaspace() -> Tokenizer:
    """As T5: the decoder drops the first token's leading space."""
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    learn(tokenizer, TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL))
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama 2: what the vocabulary lacks becomes byte tokens."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    learn(learned, TEXTS[:1], trainers.BpeTrainer(vocab_size=120))
    model = json.loads(learned.to_str())["model"]
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocab, [tuple(pair) for pair in model["merges"]], byte_fallback=True))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def learn(tokenizer: Tokenizer, texts: list[str], trainer: Any) -> None:
    trainer.show_progress = False
    tokenizer.train_from_iterator(texts * 4, trainer)


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


BYTE_LEVEL = wrap(byte_level())
METASPACE = wrap(metaspace())
BYTE_FALLBACK = wrap(byte_fallback())


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def decode(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    return tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=True)


def byte_level_ids(raw: bytes) -> list[int]:
    """One token per byte. GPT-2's table: printable bytes stand for themselves, the others from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [byte for byte in range(256) if byte not in plain]
    units = {byte: chr(byte) for byte in plain} | {byte: chr(0x100 + i) for i, byte in enumerate(other)}
    return [cast(int, BYTE_LEVEL.convert_tokens_to_ids(units[byte])) for byte in raw]


def fallback_ids(raw: bytes) -> list[int]:
    return [cast(int, BYTE_FALLBACK.convert_tokens_to_ids(f"<0x{byte:02X}>")) for byte in raw]


def stream(detokenizer: Detokenizer, chunks: Sequence[Sequence[int]]) -> str:
    """All the text that a stream sends."""
    return "".join(detokenizer.push(chunk).text for chunk in chunks) + detokenizer.finish()


def one_by_one(ids: Sequence[int]) -> list[list[int]]:
    return [[token_id] for token_id in ids]


def any_ids(tokenizer: PreTrainedTokenizerFast) -> st.SearchStrategy[list[int]]:
    """Ids as random weights draw them, a few of no token at all, and special ones many in a row."""
    one = st.integers(0, len(tokenizer) + 5).map(lambda token_id: [token_id])
    parts = st.lists(one | st.integers(0, 12).map(lambda count: [EOS] * count), max_size=40)
    return parts.map(lambda lists: [token_id for part in lists for token_id in part])


@st.composite
def chunked(draw: st.DrawFn, ids: st.SearchStrategy[list[int]]) -> list[list[int]]:
    """Ids, cut into pushes anywhere; some of them empty."""
    all_ids = draw(ids)
    edges = [0, *sorted(draw(st.lists(st.integers(0, len(all_ids)), max_size=8))), len(all_ids)]
    return [all_ids[a:b] for a, b in pairwise(edges)]


def joined(chunks: list[list[int]]) -> list[int]:
    return [token_id for chunk in chunks for token_id in chunk]


# A prompt that ends in U+FFFD reads like one that ends within a character.
PROMPTS = st.text(max_size=20).filter(lambda text: not text.endswith("\ufffd"))


class TestText:
    @settings(max_examples=300, deadline=None)
    @given(any_ids(BYTE_LEVEL), chunked(any_ids(BYTE_LEVEL)))
    def test_of_byte_level_ids_is_what_decoding_the_output_gives(
        self, prompt: list[int], output: list[list[int]]
    ) -> None:
        assert stream(Detokenizer(BYTE_LEVEL, prompt), output) == decode(BYTE_LEVEL, joined(output))

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.binary(max_size=12) | st.sampled_from(["é", "漢", "😀"]).map(str.encode), max_size=12))
    def test_of_any_bytes_is_their_utf8_with_replacements(self, parts: list[bytes]) -> None:
        raw = b"".join(parts)
        assert stream(Detokenizer(BYTE_LEVEL, ()), one_by_one(byte_level_ids(raw))) == raw.decode(errors="replace")

    @settings(max_examples=200, deadline=None)
    @given(PROMPTS.map(lambda text: encode(METASPACE, text)), chunked(any_ids(METASPACE)))
    def test_of_metaspace_ids_is_what_they_add_to_the_prompt(self, prompt: list[int], output: list[list[int]]) -> None:
        added = decode(METASPACE, prompt + joined(output))[len(decode(METASPACE, prompt)) :]
        assert stream(Detokenizer(METASPACE, prompt), output) == added

    @settings(max_examples=200, deadline=None)
    @given(PROMPTS, chunked(st.text(max_size=40).map(lambda text: encode(BYTE_FALLBACK, text))))
    def test_with_byte_fallback_is_what_they_add_to_the_prompt(self, prompt: str, output: list[list[int]]) -> None:
        prompt_ids = encode(BYTE_FALLBACK, prompt)
        added = decode(BYTE_FALLBACK, prompt_ids + joined(output))[len(decode(BYTE_FALLBACK, prompt_ids)) :]
        assert stream(Detokenizer(BYTE_FALLBACK, prompt_ids), output) == added

    @settings(max_examples=200, deadline=None)
    @given(any_ids(BYTE_FALLBACK), chunked(any_ids(BYTE_FALLBACK)))
    def test_of_invalid_byte_runs_does_not_depend_on_chunking(self, prompt: list[int], output: list[list[int]]) -> None:
        whole = stream(Detokenizer(BYTE_FALLBACK, prompt), [joined(output)])
        assert stream(Detokenizer(BYTE_FALLBACK, prompt), output) == whole

    @pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, METASPACE, BYTE_FALLBACK])
    def test_equals_what_transformers_decodes(self, tokenizer: PreTrainedTokenizerFast) -> None:
        ids = encode(tokenizer, " ".join(TEXTS[:3]))
        assert stream(Detokenizer(tokenizer, ()), one_by_one(ids)) == tokenizer.decode(ids, skip_special_tokens=True)

    def test_comes_in_whole_characters_as_soon_as_they_are_whole(self) -> None:
        ids = encode(BYTE_LEVEL, "naïve 漢字 👨\u200d👩\u200d👧 \U00020000")
        detokenizer, sent = Detokenizer(BYTE_LEVEL, ()), ""
        for count, token_id in enumerate(ids, 1):
            sent += detokenizer.push([token_id]).text
            assert sent == decode(BYTE_LEVEL, ids[:count]).rstrip("\ufffd")

    def test_with_byte_fallback_comes_in_whole_characters(self) -> None:
        detokenizer = Detokenizer(BYTE_FALLBACK, ())
        deltas = [detokenizer.push([token_id]).text for token_id in fallback_ids("A漢😂é".encode())]
        assert deltas == ["A", "", "", "漢", "", "", "", "😂", "", "é"]

    def test_comes_though_tokens_never_end_between_characters(self) -> None:
        tokenizer = Tokenizer(models.WordLevel({"âĤ": 0, "¬âĤ": 1}, unk_token="âĤ"))  # E2 82 | AC E2 82 | AC E2 82 ...
        tokenizer.decoder = decoders.ByteLevel()
        detokenizer = Detokenizer(wrap(tokenizer), ())
        assert [detokenizer.push([token_id]).text for token_id in [0, *[1] * 100]] == ["", *["€"] * 100]
        assert detokenizer.finish() == "\ufffd"

    def test_of_a_long_invalid_byte_run_has_one_replacement_per_byte(self) -> None:
        ids = [*fallback_ids(b"\x80" * 32 + "😂".encode() * 20), *encode(BYTE_FALLBACK, "dog")]
        assert stream(Detokenizer(BYTE_FALLBACK, ()), one_by_one(ids)) == decode(BYTE_FALLBACK, ids)

    def test_of_the_first_token_comes_at_once(self) -> None:
        ids = encode(BYTE_LEVEL, "The quick")
        detokenizer = Detokenizer(BYTE_LEVEL, ())
        assert [detokenizer.push([i]).text for i in ids] == [decode(BYTE_LEVEL, [i]) for i in ids]

    def test_keeps_the_space_after_the_prompt(self) -> None:
        prompt, output = encode(METASPACE, "The quick"), encode(METASPACE, "brown")
        assert stream(Detokenizer(METASPACE, prompt), one_by_one(output)) == " brown"
        assert stream(Detokenizer(METASPACE, [*prompt, EOS, EOS]), one_by_one(output)) == " brown"
        assert stream(Detokenizer(METASPACE, prompt), one_by_one([100_000, *output])) == " brown"
        assert stream(Detokenizer(METASPACE, [EOS]), one_by_one(output)) == "brown"

    @pytest.mark.parametrize("output", [b"xyz", b"\x98x", b"\x98\x82x"])
    def test_owes_nothing_to_a_prompt_that_ends_within_a_character(self, output: bytes) -> None:
        prompt, ids = byte_level_ids(b"abc\xf0\x9f"), byte_level_ids(output)
        assert stream(Detokenizer(BYTE_LEVEL, prompt), one_by_one(ids)) == decode(BYTE_LEVEL, ids)

    def test_that_was_sent_survives_an_invalid_end_of_its_byte_run(self) -> None:
        letter, rest = fallback_ids(b"A"), [*fallback_ids(b"\xe2"), *encode(BYTE_FALLBACK, "dog")]
        assert decode(BYTE_FALLBACK, letter + rest) == "\ufffd\ufffd dog"
        assert stream(Detokenizer(BYTE_FALLBACK, ()), one_by_one(letter + rest)) == "A\ufffd dog"

    @pytest.mark.parametrize(
        "ids",
        [byte_level_ids(b"\x80") * 2000, [EOS] * 2000, [100_000] * 2000, byte_level_ids(b"\xf0\x9f\x98a") * 500],
        ids=["invalid bytes", "special tokens", "no tokens", "broken characters"],
    )
    def test_costs_the_same_for_every_token(self, ids: list[int]) -> None:
        backend, decoded = BYTE_LEVEL.backend_tokenizer, 0

        def count(window: list[int], **options: Any) -> str:
            nonlocal decoded
            decoded += len(window)
            return backend.decode(window, **options)

        counting = SimpleNamespace(
            decode=count,
            id_to_token=backend.id_to_token,
            get_added_tokens_decoder=backend.get_added_tokens_decoder,
        )
        detokenizer = Detokenizer(cast(Any, Counted(counting)), byte_level_ids(b"abc"))
        assert stream(detokenizer, one_by_one(ids)) == decode(BYTE_LEVEL, ids)
        assert decoded < 100 * len(ids)


class Counted:
    """A tokenizer around a backend."""

    def __init__(self, backend: SimpleNamespace) -> None:
        self.backend_tokenizer = backend


def cut_at_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The specification: the first character that completes a stop string ends it; the longest one counts."""
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        return text, False
    end = min(ends)
    return text[: end - max(len(stop) for stop in stops if text[:end].endswith(stop))], True


ASCII_IDS = st.text("abcd ", max_size=40).map(lambda text: encode(BYTE_LEVEL, text))
STOPS = st.lists(st.text("abcd ", min_size=1, max_size=5), max_size=4)


class TestStopStrings:
    @settings(max_examples=300, deadline=None)
    @given(chunked(any_ids(BYTE_LEVEL)), st.data())
    def test_end_the_text_wherever_they_are(self, output: list[list[int]], data: st.DataObject) -> None:
        text = decode(BYTE_LEVEL, joined(output))
        bounds = st.tuples(st.integers(0, len(text)), st.integers(1, 6))
        pieces = [text[a : a + n] for a, n in data.draw(st.lists(bounds, max_size=4))]
        stops = [piece for piece in [*pieces, *data.draw(STOPS)] if piece]
        detokenizer = Detokenizer(BYTE_LEVEL, (), stops)
        assert (stream(detokenizer, output), detokenizer.stopped) == cut_at_stop(text, stops)

    @settings(max_examples=300, deadline=None)
    @given(ASCII_IDS, STOPS)
    def test_hold_back_no_more_than_their_beginning(self, ids: list[int], stops: list[str]) -> None:
        detokenizer, sent = Detokenizer(BYTE_LEVEL, (), stops), ""
        for count, token_id in enumerate(ids, 1):
            delta = detokenizer.push([token_id])
            sent += delta.text
            if delta.stopped:
                break
            text = decode(BYTE_LEVEL, ids[:count])
            held = [n for n in range(len(text) + 1) if any(stop.startswith(text[len(text) - n :]) for stop in stops)]
            assert sent == text[: len(text) - max(held, default=0)]

    @settings(max_examples=300, deadline=None)
    @given(chunked(ASCII_IDS), STOPS)
    def test_consume_tokens_up_to_the_one_that_completes_them(self, output: list[list[int]], stops: list[str]) -> None:
        ids = joined(output)
        detokenizer = Detokenizer(BYTE_LEVEL, (), stops)
        consumed = sum(detokenizer.push(chunk).consumed for chunk in output)
        complete = [n for n in range(len(ids) + 1) if cut_at_stop(decode(BYTE_LEVEL, ids[:n]), stops)[1]]
        assert consumed == min(complete, default=len(ids))

    @settings(max_examples=300, deadline=None)
    @given(chunked(ASCII_IDS), st.text("abcd ", min_size=1, max_size=3), st.integers(0, 10))
    def test_are_not_completed_by_the_first_min_tokens(self, output: list[list[int]], stop: str, least: int) -> None:
        ids = joined(output)
        text, free = decode(BYTE_LEVEL, ids), len(decode(BYTE_LEVEL, ids[:least]))
        found = text.find(stop, max(free - len(stop) + 1, 0))
        detokenizer = Detokenizer(BYTE_LEVEL, (), [stop], least)
        assert stream(detokenizer, output) == (text if found < 0 else text[:found])
        assert detokenizer.stopped == (found >= 0)

    def test_span_tokens(self) -> None:
        ids = byte_level_ids(b"go on. Stop here, then")
        assert stream(Detokenizer(BYTE_LEVEL, (), ["Stop here"]), one_by_one(ids)) == "go on. "

    def test_of_several_the_first_complete_one_counts_and_then_the_longest(self) -> None:
        ids = byte_level_ids(b"xabcdefg")
        assert stream(Detokenizer(BYTE_LEVEL, (), ["abcdef", "cd"]), one_by_one(ids)) == "xab"
        assert stream(Detokenizer(BYTE_LEVEL, (), ["d", "bcd", "cd"]), one_by_one(ids)) == "xa"

    def test_that_overlap_themselves_are_found(self) -> None:
        ids = byte_level_ids(b"aabaabaaab.")
        assert stream(Detokenizer(BYTE_LEVEL, (), ["aabaaab"]), one_by_one(ids)) == "aab"

    def test_that_begin_within_the_first_min_tokens_are_found(self) -> None:
        assert stream(Detokenizer(BYTE_LEVEL, (), ["aa"], 2), one_by_one(byte_level_ids(b"aaab"))) == "a"

    def test_are_released_when_the_stream_ends_before_them(self) -> None:
        detokenizer = Detokenizer(BYTE_LEVEL, (), ["###"])
        assert detokenizer.push(byte_level_ids(b"a##")) == ("a", False, 3)
        assert detokenizer.finish() == "##"
        assert not detokenizer.stopped

    def test_are_found_in_what_was_held_for_half_a_character(self) -> None:
        unit = cast(int, BYTE_LEVEL.backend_tokenizer.token_to_id("ð"))
        detokenizer = Detokenizer(BYTE_LEVEL, (), ["\ufffd"])
        assert detokenizer.push([*byte_level_ids(b"a"), unit]) == ("a", False, 2)
        assert detokenizer.finish() == ""
        assert detokenizer.stopped

    def test_leave_nothing_to_send_after_them(self) -> None:
        detokenizer = Detokenizer(BYTE_LEVEL, (), ["b"])
        assert detokenizer.push(byte_level_ids(b"abc")) == ("a", True, 2)
        assert detokenizer.push(byte_level_ids(b"xyz")) == ("", True, 0)
        assert detokenizer.finish() == ""

    def test_must_not_be_empty(self) -> None:
        with pytest.raises(ValueError, match="empty"):
            Detokenizer(BYTE_LEVEL, (), ["a", ""])
