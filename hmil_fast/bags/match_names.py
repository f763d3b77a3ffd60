"""Match names of slides, patients and labels between files that spell them differently."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from hmil_fast.errors import UsageError

# what follows the name of a slide in the names of its files
_SUFFIX = re.compile(
    r"\.(svs|tiff?|ome|ndpi|mrxs|scn|bif|vms|vmu|svslide|qptiff|czi|dcm|dicom|zarr|h5|hdf5|pt|pth|"
    r"npy|npz|jpe?g|png|geojson)$",
    re.IGNORECASE,
)
_UUID = re.compile(r"\.[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$", re.IGNORECASE)  # of GDC


def plain(name: str) -> str:
    """Normalise a name to NFC, without the ".0" that pandas adds to a whole number."""
    name = unicodedata.normalize("NFC", name).strip()
    return re.sub(r"^(\d+)\.0+$", r"\1", name)


def without_suffix(name: str) -> str:
    """Remove a slide file's suffixes from a name, and normalise it by `plain`."""
    name = plain(name.replace("\\", "/"))
    while (shorter := _SUFFIX.sub("", name)) not in ("", name):
        name = shorter
    return plain(name)


def alike(name: str) -> str:
    """Return a key that equal names share: `plain`, without case and leading zeros."""
    name = unicodedata.normalize("NFKC", plain(name)).casefold()
    return re.sub(r"^0+(?=\d+$)", "", " ".join(name.split()))


def slide_like(name: str) -> str:
    """Return `alike` of a slide's name, without the UUID that GDC adds to it."""
    return alike(_UUID.sub("", without_suffix(name)))


def match_slides(names: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Match each name with one known slide.

    A name stands for itself where it is known, else for the slide that has the same name without
    its suffix, else in other letters, without leading zeros, or with more or fewer folders in front
    ("/data/a/s1" is "s1" or "a/s1").

    Returns:
        Known name by given name; a name that matches nothing is left out.

    Raises:
        UsageError: A name may be one of several slides, or two names stand for one slide.
    """
    names, known = list(dict.fromkeys(names)), set(known)
    matches = {name: name for name in names if name in known}
    _match(names, known, matches, lambda name: [without_suffix(name)])
    # a slide that is named in full is not also one that is named less well
    _match(names, known - set(matches.values()), matches, lambda name: _ends(slide_like(name)))
    first: dict[str, str] = {}
    for name, other in matches.items():
        if first.setdefault(other, name) != name:
            raise UsageError(
                f"{first[other]!r} and {name!r} both name the slide {other!r}",
                "keep one of the two lines",
            )
    return matches


def _match(
    names: Sequence[str],
    known: Iterable[str],
    matches: dict[str, str],
    forms: Callable[[str], list[str]],
) -> None:
    """Add to `matches` names that share a form with one known name; the first form is the whole."""
    left = [name for name in names if name not in matches]
    if not left:
        return
    wholes, parts = defaultdict[str, set[str]](set), defaultdict[str, set[str]](set)
    for other in known:
        whole, *shorter = forms(other)
        wholes[whole].add(other)
        for form in shorter:
            parts[form].add(other)
    for name in left:
        whole, *shorter = forms(name)
        fits = wholes[whole] | parts[whole] | {o for form in shorter for o in wholes[form]}
        if len(fits) > 1:
            raise UsageError(
                f"slide {name!r} may be {' or '.join(map(repr, sorted(fits)[:3]))}",
                "write its name as one of these, letter by letter",
            )
        if fits:
            matches[name] = fits.pop()


def _ends(path: str) -> list[str]:
    """The path, and what remains of it without its first, first two, … folders."""
    parts = path.split("/")
    return ["/".join(parts[start:]) for start in range(len(parts))]
