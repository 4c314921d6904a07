"""The ledger: shares a study's quota among its workers through trial rows alone."""
