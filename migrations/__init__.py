"""The schema's history, in `versions/`. Forward only: old code runs on a newer schema, so nothing is downgraded."""
