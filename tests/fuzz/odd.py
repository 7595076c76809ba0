"""What odd input is made of."""

from hypothesis import strategies as st

# Values that somebody might write, and a few that nobody should.
NUMBERS = st.one_of(
    st.sampled_from([0, -1, 1, 2, 2**31, 2**32, 2**63, 10**12, 10**18, 10**400, -0.0, 1e-320, 1e300, 0.5, 1.5]),
    st.floats(),
    st.integers(),
)
TEXTS = st.one_of(
    st.sampled_from(["", " ", "\0", "\ud800", "é", "nan", "inf", "null", "none", "true", "1e999", "x" * 300, "y" * 5000,
                     "9" * 5000, "a/b/c", "/", ".", "..", "/dev/full", "/root/x", "-", "--", "\n\nHuman:", "%s {}",
                     "cpu-99999999999", "data=0", "\x1b[31m", "１", "¹"]),
    st.text(max_size=20),
)  # fmt: skip


@st.composite
def damaged(draw, content):
    """Bytes with one or two faults of a disk, a transfer or an editor."""
    for _ in range(draw(st.integers(1, 2))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 30)))
        replacement = draw(
            st.one_of(
                st.just(b""),
                st.binary(max_size=8),
                st.sampled_from([b"\0", b"\xff\xfe", b"\n", b"\r", b'"', b"{", b"}", b"[" * 5000, b"9" * 5000, b"NaN",
                                 b"1e999", b"\xed\xa0\x80", b"\\ud800", b"\xef\xbb\xbf", b": ", b"&a", b"*a",
                                 b"!!int x"]),
            )
        )  # fmt: skip
        content = content[:start] + replacement + (content[end:] if draw(st.booleans()) else content[start:])
        if draw(st.integers(0, 9)) == 0:
            content = content[: draw(st.integers(0, len(content)))]
    return content
