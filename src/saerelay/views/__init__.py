"""What people look at: tables, figures, the report and the judging page.

Made from documents and features that exist already; nothing here measures.
May import the ground, `planning` and `runs`.
"""
