// The words of the views, in the language of the front end.
import { app } from '../../scripts/app.js'

const WORDS = {
  zh: {
    Slider: '滑块',
    Flip: '切换',
    Difference: '差异',
    'Side by side': '并排',
    'Move over the picture: A on the left, B on the right': '在图片上移动：左边是 A，右边是 B',
    'Click the picture to change between A and B': '点击图片切换 A 和 B',
    'What differs, so many times as bright; equal pixels are black': '不同之处，亮度放大若干倍；相同的像素是黑色',
    'All of them, with one zoom': '全部并排，同步缩放',
    'Brightness of the difference': '差异的亮度',
    'Which picture is on the left': '左边是哪一张',
    'Which picture is on the right': '右边是哪一张',
    'The pair before': '上一对',
    'The next pair': '下一对',
    of: '/',
    'Zoom; click to reset': '缩放；点击还原',
    Enlarge: '放大',
    Close: '关闭',
    'Fill the window; Escape closes': '占满窗口；按 Escape 关闭',
    Save: '保存',
    'Save the pictures shown, with the workflow in them': '保存显示的图片，图中带有工作流',
    Copy: '复制',
    'Copy what is shown': '复制当前显示的内容',
    Copied: '已复制',
    'Copying needs https or localhost': '复制需要 https 或 localhost',
    'The pictures are gone; run again': '图片已不存在，请重新运行',
    'Click the picture, then turn the wheel to zoom': '点击图片后滚动滚轮可缩放',
    'Run the workflow to compare': '运行工作流后即可对比',
    identical: '完全相同',
    'sizes differ': '尺寸不同'
  },
  ja: {
    Slider: 'スライダー',
    Flip: '切り替え',
    Difference: '差分',
    'Side by side': '横並び',
    'Move over the picture: A on the left, B on the right': '画像の上で動かします。左が A、右が B です',
    'Click the picture to change between A and B': '画像をクリックすると A と B が入れ替わります',
    'What differs, so many times as bright; equal pixels are black': '違うところを何倍かの明るさで示します。等しい画素は黒です',
    'All of them, with one zoom': 'すべてを並べ、ズームは共通です',
    'Brightness of the difference': '差分の明るさ',
    'Which picture is on the left': '左に表示する画像',
    'Which picture is on the right': '右に表示する画像',
    'The pair before': '前の組',
    'The next pair': '次の組',
    of: '/',
    'Zoom; click to reset': 'ズーム。クリックで戻します',
    Enlarge: '拡大',
    Close: '閉じる',
    'Fill the window; Escape closes': 'ウィンドウいっぱいに表示。Escape で閉じます',
    Save: '保存',
    'Save the pictures shown, with the workflow in them': '表示中の画像をワークフロー付きで保存します',
    Copy: 'コピー',
    'Copy what is shown': '表示中のものをコピーします',
    Copied: 'コピーしました',
    'Copying needs https or localhost': 'コピーには https か localhost が必要です',
    'The pictures are gone; run again': '画像がもうありません。もう一度実行してください',
    'Click the picture, then turn the wheel to zoom': '画像をクリックしてからホイールでズームします',
    'Run the workflow to compare': 'ワークフローを実行すると比較できます',
    identical: '同一',
    'sizes differ': 'サイズが違います'
  }
}

// English text, or what stands for it; the front end's zh-TW takes the words of zh.
export function word(text) {
  const locale = app.extensionManager?.setting?.get('Comfy.Locale') ?? ''
  return WORDS[locale.split('-')[0]]?.[text] ?? text
}
