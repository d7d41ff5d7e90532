"""Which page of the cache belongs to whom: reference counts, and reuse of pages with equal content."""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import islice, takewhile

from stackrace.backends.mla.cache import PAGE


def digest(before: bytes, tokens: Sequence[int]) -> bytes:
    """Names the content of a full page: its tokens and all before them, by the previous page's digest."""
    return blake2b(before + array("q", tokens).tobytes(), digest_size=16).digest()


def extend(digests: list[bytes], tokens: Sequence[int], num_pages: int) -> list[bytes]:
    """The digests of the first `num_pages` full pages of `tokens`; what lacks is appended to `digests`."""
    for index in range(len(digests), num_pages):
        digests.append(digest(digests[-1] if digests else b"", tokens[index * PAGE : (index + 1) * PAGE]))
    return digests[:num_pages]


class PagePool:
    """Pages by number, the same in every layer. A page is free while nobody refers to it.

    A free page keeps its content, and can be found by it, until it is taken for another; those that nobody can
    find go first, then the one that has been free for longest.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._references = [0] * num_pages
        self._free = OrderedDict.fromkeys(range(num_pages))  # in the order in which they are taken
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Pages nobody refers to."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` pages for new content, lowest numbers first on a fresh pool. So many must be free."""
        assert count <= len(self._free)
        pages = list(islice(self._free, count))
        for page in pages:
            self._forget(page)
            self._refer(page)
        return pages

    def give_back(self, pages: Sequence[int]) -> None:
        """One reference less to each. Later pages of a sequence are reused first: without the earlier ones nobody
        can find them.
        """
        for page in reversed(pages):
            self._references[page] -= 1
            assert self._references[page] >= 0
            if not self._references[page]:
                self._free[page] = None
                self._free.move_to_end(page, last=page in self._digest_of)

    def find(self, contents: Iterable[bytes]) -> list[int]:
        """The pages that hold these contents, up to the first that is not there."""
        return [self._page_of[content] for content in takewhile(self._page_of.__contains__, contents)]

    def count_free(self, pages: Iterable[int]) -> int:
        """How many of these nobody refers to."""
        return sum(page in self._free for page in pages)

    def share(self, pages: Iterable[int]) -> None:
        """A reference more to each of these."""
        for page in pages:
            self._refer(page)

    def publish(self, page: int, content: bytes) -> None:
        """Let `find` find a page, now full, by its content; the first of two equal ones serves."""
        if content not in self._page_of:
            self._page_of[content] = page
            self._digest_of[page] = content

    def reset(self) -> None:
        """No content is found any more; whoever refers to pages keeps them."""
        self._page_of.clear()
        self._digest_of.clear()

    def _refer(self, page: int) -> None:
        self._references[page] += 1
        self._free.pop(page, None)

    def _forget(self, page: int) -> None:
        content = self._digest_of.pop(page, None)
        if content is not None:
            del self._page_of[content]
