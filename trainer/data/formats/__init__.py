"""The forms in which people have preference data, each read as one.

May import errors and the trainer's files. `files` opens files, folders and hub names, and `damage`
finds what is wrong in one. `shapes` knows data sets by their columns, and `converters` read their
rows. `messages` reads messages in the forms that others write.
"""
