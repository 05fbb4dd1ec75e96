"""The programs that come with asmodel: one file each, and each reads as a page of its paper."""
