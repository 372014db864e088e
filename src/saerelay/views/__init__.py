"""The output that people look at: tables, figures, the report and the judging page.

All of it is made from documents and features that exist already; nothing here measures.
May import the ground, `planning` and `runs`.
"""
