"""Base models through transformers, with our attention and adapted linears."""
