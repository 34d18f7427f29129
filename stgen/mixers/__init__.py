"""Mixers without an attention map: convolutions and recurrences over the sequences of a layout."""
