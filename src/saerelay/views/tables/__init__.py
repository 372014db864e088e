"""Tables for people, on a terminal: one module per subject, each made from plans and documents."""
