"""Fonts for the names of the classes in pictures."""

from matplotlib import font_manager, rcParams

from tclip_app.images import tell


def settings_for(texts):
    """A dict of matplotlib's settings (rcParams) by which it can draw these texts.

    Where its own font lacks characters the first installed one that has them is added; where none has, axes are drawn
    without names, which is told.
    """
    own = font_manager.get_font(font_manager.findfont(None)).get_charmap()
    missing = {ord(c) for c in "".join(texts) if not c.isspace()} - own.keys()
    if not missing:
        return {}
    for font in font_manager.fontManager.ttflist:
        has = font_manager.get_font(font.fname).get_charmap().keys()
        if missing <= has and not font.name.startswith("Last Resort"):  # which has boxes for all characters
            return {"font.family": [*rcParams["font.family"], font.name]}
    lacking = "".join(sorted(map(chr, missing))[:10])
    tell(f"noise.png has no names of classes: no installed font has all of {lacking}; Noto Sans CJK, say, has many")
    return {"xtick.labelbottom": False, "ytick.labelleft": False}
