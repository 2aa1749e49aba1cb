"""Result records, tables of them, and the published figures."""
