"""Where objects lie: local folders and S3."""
