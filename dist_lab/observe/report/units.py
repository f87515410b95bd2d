"""Numbers as text, with their units."""

BYTES = ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def digits(value: float) -> str:
    """Returns a number with about three digits, and commas.

    >>> [digits(x) for x in (0, 0.01234, 1.234, 12.34, 123.4, 12345.6)]
    ['0', '0.0123', '1.23', '12.3', '123', '12,346']
    """
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 1 else f"{value:.3g}"


def of_bytes(value: float) -> str:
    """
    >>> of_bytes(65_203_111), of_bytes(921_144), of_bytes(12)
    ('65.2 MB', '921 kB', '12 B')
    """
    for size, unit in BYTES:
        if abs(value) >= size:
            return f"{digits(value / size)} {unit}"
    return f"{value:,.0f} B"


def of_ms(value: float) -> str:
    """
    >>> of_ms(0.0123), of_ms(312.4), of_ms(12_345.0)
    ('12.3 µs', '312 ms', '12.3 s')
    """
    if abs(value) >= 10_000:
        return f"{digits(value / 1e3)} s"
    if 0 < abs(value) < 0.1:
        return f"{digits(value * 1e3)} µs"
    return f"{digits(value)} ms"


def percent(share: float) -> str:
    return f"{share:.1%}"


def plural(count: int, noun: str) -> str:
    """
    >>> plural(1, "rank"), plural(2, "rank")
    ('1 rank', '2 ranks')
    """
    return f"{count:,} {noun}{'s' * (count != 1)}"
