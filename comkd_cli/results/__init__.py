"""Result records, tables of them, and published figures."""
