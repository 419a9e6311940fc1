"""What is on disk was written with these hashes."""

from moe_jax.base.hashes import digest, digest_all, digest_bytes, digest_file, hasher

PINNED = (
    "4826ed043ab3cdec576d8541fa5d5a80",
    "f14abc19c330e936bb9c8506d69bac9b",
    "cae66941d9efbd404e4d88758ea67670",
    "177a50b87c73fd659700262342a29c30",
)


def test_the_hashes_stay_what_they_were():
    assert digest("ab", "c") == PINNED[0]
    assert digest("a", "bc") == PINNED[1]
    assert digest() == digest_bytes(b"") == PINNED[2]
    assert digest_bytes(b"moe_jax") == PINNED[3]


def test_one_content_has_one_hash_however_it_comes(tmp_path):
    (tmp_path / "file").write_bytes(b"moe_jax" * 100_000)
    state = hasher()
    for _ in range(100_000):
        state.update(b"moe_jax")
    assert digest_file(tmp_path / "file") == state.hexdigest() == digest_bytes(b"moe_jax" * 100_000)
    assert digest_all(iter(["ab", "c"])) == digest("ab", "c")
    assert digest("\udce9") != digest("é")  # a name that is no UTF-8
