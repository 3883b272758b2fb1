"""Rows of text from any source, split into training and evaluation rows, and turned into token ids.

Imported by the stages, `align.evaluate`, `align.cli` and everything that handles rows; imports `align.config` only. Public:
`load.load_rows` (sources to typed rows), `tokenize.tokenize_*` (typed rows to data sets of ids), `encode.encode_*` (one
prompt, response or pair to ids), `batches` (order, packing, padding rows) and `collate` (padding to tensors).
"""
