"""The embedded base: a small pretrained decoder that ships with the package.

What it is: a Llama-shaped model of 2.7M parameters (4 layers, 256 wide, 8 heads over 4 KV heads, tied
embeddings, 1,024 positions) with its own byte-level BPE of 1,280 tokens; bf16, 5.3 MB. It exists so that
`chorus demo`, `chorus serve` without `--model`, the README and the tests have a real model where no hub can
be reached.

What it can do: tasks of a tiny closed world, asked in their own form, such as
`Message: This is Tom from Berlin. Please send me 4 lamps. Thank you.` + newline + `City:` -> ` Berlin`
(facts, topic, tone, summary and reply of a message, moods of reviews, dates in words, capitals, first, last and
reversed list, opening hours, a card as a sentence, countries: 99 % and more of held-out prompts); short stories after
`Story:` and shop dialogues after `Customer:`; and learning a tenant's variation of them through a small adapter.

What it can not do: look a thing up by its neighbour or compare (which of three people is the baker, the cheapest of
three, how often a thing is listed: it answers in the right form, and is right in a third to two thirds of the cases),
and anything outside its world. It knows forty names, twenty-four cities and thirty things; it does not follow
instructions; other text gives nonsense. Past its end token (ignored on purpose) it often repeats that token and then
starts another document. Most single bytes never stood in an answer, so an adapter learns slowly to spell words that
the world does not have. It is no benchmark of quality.

Made by `python -m chorus.trainer.pretrain`; `PROVENANCE.json` beside this file holds the exact command, its
seed and steps, and what was measured on held-out prompts.
"""

from pathlib import Path


def path() -> Path:
    """The folder that transformers' `from_pretrained` loads model and tokenizer from."""
    return Path(__file__).resolve().parent
