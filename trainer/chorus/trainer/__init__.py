"""The trainer: JSONL in, a PEFT adapter out; and the embedded base with its small world."""
