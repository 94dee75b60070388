"""Adapters: from PEFT's files to operators, stored by content, resident by need."""
