from mla_patch.cli import main

raise SystemExit(main())
