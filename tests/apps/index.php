hello from <?= getmypid() ?>
