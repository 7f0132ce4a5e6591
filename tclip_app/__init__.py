"""The command `tclip`: train a student on a folder of one's own images, use it, look at it, and take it elsewhere."""
