"""The one table of letters for the axes of arrays.

jaxtyping annotations and einsum strings use them (lower case in einsum). An axis that has no letter
is a word, such as `layers` or `kv_heads`. tests/repository/test_letters.py holds the code to this.
"""

LETTERS = {
    "B": "batch",
    "L": "length",
    "T": "B·L tokens",
    "D": "model width",
    "H": "heads",
    "E": "experts",
    "K": "experts a token",
    "F": "expert hidden",
    "S": "T·K expert-sorted rows",
    "R": "padded rows",
    "G": "groups or devices",
    "V": "vocabulary",
    "P": "stages",
    "M": "micro-batches",
    "N": "any number of rows (tokens, sequences or documents) or columns",
}
"""Letter -> meaning."""
