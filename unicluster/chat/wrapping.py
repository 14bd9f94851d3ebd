"""Text that comes piece by piece, broken between words for a terminal."""

from collections.abc import Callable

from rich.cells import cell_len

# In a narrower terminal, or one whose width nobody knows, lines are left to it.
NARROWEST = 20
TAB = 8
# A word that has so many columns left is shown as it comes.
MARGIN = 24
FENCES = ("```", "~~~")


class WordWrap:
    """Breaks lines at spaces; near the edge a word is held back until its end is known.

    Lines of code blocks are left as they are: they may be copied.
    """

    def __init__(self, columns: Callable[[], int]) -> None:
        """`columns` is the width of the terminal now; 0: not known."""
        self._columns = columns
        self._column = 0
        self._line_begins = True
        self._spaces = self._word = ""
        self._code = False

    def feed(self, text: str) -> str:
        """Text that can be shown now that `text` has come."""
        width = self._columns()
        if width < NARROWEST:
            return self.flush() + text
        shown = []
        for character in text:
            if character == "\n":
                shown += [self._placed(width), self._spaces, "\n"]
                self._spaces, self._column, self._line_begins = "", 0, True
            elif character in " \t":
                shown.append(self._placed(width))
                self._spaces += character
            elif cell_len(character) > 1:  # scripts without spaces break anywhere
                shown.append(self._placed(width))
                self._word = character
                shown.append(self._placed(width))
            else:
                self._word += character
                if cell_len(self._word) >= width:
                    shown.append(self._placed(width))
        needed = _cells(self._spaces, self._column) + cell_len(self._word)
        perhaps_fence = self._line_begins and self._word.startswith(("`", "~"))
        if self._column + needed + MARGIN <= width and not perhaps_fence:
            shown.append(self._placed(width))
        return "".join(shown)

    def flush(self) -> str:
        """The word that was held back, which ends here."""
        return self._placed(max(self._columns(), NARROWEST)) + self._end_spaces()

    def _end_spaces(self) -> str:
        spaces, self._spaces = self._spaces, ""
        self._column += _cells(spaces, self._column)
        return spaces

    def _placed(self, width: int) -> str:
        """The pending spaces and word, on a new line if there is no room for both."""
        word, spaces = self._word, self._spaces
        if not word:
            return ""
        self._word = self._spaces = ""
        if self._line_begins and word.startswith(FENCES):
            self._code = not self._code
        fence = self._line_begins and word.startswith(FENCES)
        self._line_begins = False
        needed = _cells(spaces, self._column) + cell_len(word)
        # The rest of a word that is longer than a line goes on where it is.
        breakable = bool(spaces) or cell_len(word[0]) > 1
        fits = self._column + needed <= width
        if self._column and breakable and not (fits or self._code or fence):
            self._column = cell_len(word)
            return f"\n{word}"
        self._column = (self._column + needed - 1) % width + 1
        return spaces + word


def _cells(spaces: str, column: int) -> int:
    """Columns that spaces and tabs take from that column on."""
    end = column
    for space in spaces:
        end += TAB - end % TAB if space == "\t" else 1
    return end - column
