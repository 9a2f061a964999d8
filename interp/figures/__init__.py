"""Pictures of reports. Drawing never computes: a figure shows what the Report already holds."""
